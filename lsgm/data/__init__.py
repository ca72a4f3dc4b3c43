"""Datasets: where they come from (registry, sources), how they are kept (store) and fed to a model (batches)."""
