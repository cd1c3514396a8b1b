"""Weights in the layouts of other projects, read and written: a file per format."""
