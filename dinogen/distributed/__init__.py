"""Many processes as one: the process group, their common end, their random numbers."""
