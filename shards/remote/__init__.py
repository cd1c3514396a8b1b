"""Shards behind a URL: downloaded whole, cached under a limit, ahead of need."""
