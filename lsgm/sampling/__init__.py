"""Drawing latents from the prior, and their likelihood."""
