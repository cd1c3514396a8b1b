"""A run on this machine: its processes, and the signals they are passed."""
