"""Quantisation and rate: what stands between a latent and its bits, one file a family."""
