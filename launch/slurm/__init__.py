"""A run on a cluster: the jobs it needs, submitting them, and what became of them."""
