"""From photos to aligned faces and their pyramids."""
