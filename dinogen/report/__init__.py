"""Images, curves and the page of a run, made from the run's files alone."""
