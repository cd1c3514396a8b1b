"""Whole train steps of configs, on shards packed for them: what they launch and wait for."""
