"""Feature extractors: the frozen networks by whose features images are measured, one file each.

Each has a function ``load(path, device)``, which `dinogen.metrics.suite` calls by the file's name.
"""
