"""The ``dinogen`` command, one file per group; heavy imports stay inside the commands."""
