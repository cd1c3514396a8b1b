"""What lies on disk: samples in tars, indexes, manifests and statistics."""
