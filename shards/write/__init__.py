"""Samples to datasets: shards, indexes, statistics and manifest, whole or not at all."""
