"""The version of dinogen: here alone; setup.cfg reads it from this file."""

__version__ = "0.1.0"
