"""Adaptive discriminator augmentation: the pipeline and its transforms."""
