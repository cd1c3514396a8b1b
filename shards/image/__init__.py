"""Decodes image files, and decides what an image is and what is damaged."""
