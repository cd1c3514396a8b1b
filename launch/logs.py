"""How the command line shows log messages: through rich, warnings in colour, on stderr."""

from __future__ import annotations

import logging

from rich.console import Console
from rich.logging import RichHandler


def setup_logging(quiet: bool = False) -> None:
    """Show dinogen's messages; only errors where ``quiet`` (ranks other than 0)."""
    console = Console(stderr=True)
    handler = RichHandler(console=console, show_path=False, rich_tracebacks=False)
    handler.setFormatter(logging.Formatter("%(message)s", datefmt="%H:%M:%S"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    level = logging.ERROR if quiet else logging.INFO
    for name in ("dinogen", "shards", "launch"):
        logging.getLogger(name).setLevel(level)
