"""Photos from a list of addresses."""
