"""dinogen."""
