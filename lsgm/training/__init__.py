"""Training: the VAE first, then VAE and score prior end to end."""
