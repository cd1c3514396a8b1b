"""The one training loop and its parts; none of them names a family."""
