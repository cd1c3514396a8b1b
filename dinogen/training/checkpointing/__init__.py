"""Checkpoints: written, read back, handed on to other runs and exported."""
