"""Datasets: where they come from (registry, sources), how they are stored (store) and fed to a model (batches)."""
