"""Figures of generated images: distances and shares over the features of frozen extractors."""
