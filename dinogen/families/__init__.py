"""One file per family of image generators; found by its file name."""
