"""Figures of generated pictures: distances and shares over the features of frozen extractors."""
