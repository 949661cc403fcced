"""Transforms between samples and latents, one file a family."""
