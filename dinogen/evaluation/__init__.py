"""Measuring runs, checkpoints and folders of images."""
