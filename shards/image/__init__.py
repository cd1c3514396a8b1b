"""Image files to pixels: the one rule for what an image is and what is damaged."""
