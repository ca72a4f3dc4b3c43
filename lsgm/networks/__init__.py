"""The networks: NVAE and NCSN++. They know neither an SDE nor a loss."""
