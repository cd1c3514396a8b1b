"""Commands of the dinogen CLI, one file per group; heavy imports stay inside the commands."""
