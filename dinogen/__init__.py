"""Distributed training of image generators guided by frozen DINOv2 features."""

__version__ = "0.1.0"
