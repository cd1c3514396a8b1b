"""From photos to aligned faces: detected, cut out, written to a folder."""
