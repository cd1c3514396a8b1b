"""A run on this machine: its processes, and the signals forwarded to them."""
