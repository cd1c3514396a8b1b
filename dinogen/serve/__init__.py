"""A page in the browser that draws from a run; needs the extra ``serve``."""
