"""Noise schedules and samplers of diffusion; no networks."""
