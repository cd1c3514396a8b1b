"""Datasets checked, repaired, or adopted from plain WebDataset tars."""
