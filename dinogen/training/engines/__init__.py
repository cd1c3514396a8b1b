"""Engines: backward, gradient averaging and the optimizer step, one file each."""
