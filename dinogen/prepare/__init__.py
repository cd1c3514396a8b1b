"""Prepares photos: aligned faces, their pyramids, and shards."""
