"""Many runs as one comparison: a self-contained page, the same as JSON and as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def write_comparison(runs: Sequence[Path], out: Path, title: str) -> Path:
    """Write ``index.html``, ``comparison.json`` and ``comparison.md`` into a folder.

    Args:
        runs: folders of runs; one that failed or was never begun is listed as such.
        out: the folder; made if it is not there.
        title: heading of the page.

    Returns:
        The page.

    Raises:
        UserError: there is nothing to compare.
    """
    raise NotImplementedError
