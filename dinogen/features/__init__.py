"""Frozen feature networks behind one Guide protocol."""
