"""Datasets to batches: an order of samples, the bytes they need, tensors."""
