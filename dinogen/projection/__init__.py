"""Finds the latents of photos: what `dinogen project` does."""
