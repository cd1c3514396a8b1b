"""How the command line shows messages: in colour on a terminal, whole lines in a log file."""

from __future__ import annotations

import logging
import sys
from contextlib import suppress

from rich.console import Console
from rich.logging import RichHandler


def setup_logging(quiet: bool = False) -> None:
    """Show dinogen's messages on stderr; only errors where ``quiet`` (ranks other than 0)."""
    console = Console(stderr=True)
    handler: logging.Handler
    if console.is_terminal:
        handler = RichHandler(console=console, show_path=False, rich_tracebacks=False)
        handler.setFormatter(logging.Formatter("%(message)s", datefmt="%H:%M:%S"))
    else:
        # rich would break lines at 80 columns: a job's log has to stay easy to search.
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    level = logging.ERROR if quiet else logging.INFO
    for name in ("dinogen", "shards", "launch"):
        logging.getLogger(name).setLevel(level)


def say(text: str, *, err: bool = False) -> None:
    """Print a line; a terminal that is gone, or a pipe that nobody reads, is no error."""
    with suppress(OSError):
        print(text, file=sys.stderr if err else sys.stdout, flush=True)
