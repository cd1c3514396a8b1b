"""A study: many runs as one plan, on this machine or by SLURM."""
