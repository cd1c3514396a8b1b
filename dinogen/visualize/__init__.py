"""What `dinogen look` draws of a run."""
