"""Metrics of generated images: distances and shares over the features of frozen networks."""
