"""Solvers: latents from the prior, and the likelihood of latents. They know a drift, and no images."""
