"""How a run is started: the command line, and what looks at the machine."""
