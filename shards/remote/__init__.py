"""Shards behind a URL: downloaded whole, cached under a limit, prefetched."""
