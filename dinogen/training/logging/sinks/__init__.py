"""Where a run is shown besides its own page: one file per sink, found by its name."""
