"""Bits: the entropy coder, its integer tables and the container."""
