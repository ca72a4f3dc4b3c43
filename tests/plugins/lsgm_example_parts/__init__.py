"""One part of each kind that LSGM lets an installed package add."""
