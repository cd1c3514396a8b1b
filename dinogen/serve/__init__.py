"""A web page that samples from a run; needs the extra ``serve``."""
