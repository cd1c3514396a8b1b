"""Lines of ours that run right now, for whatever is counted there."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from types import FrameType


class Lines:
    """Names places in the files below a folder.

    Args:
        root: of the code; its ``benchmarks`` and ``.venv`` are not ours.
    """

    def __init__(self, root: Path) -> None:
        self._root = f"{root.resolve()}/"

    def here(self, what: str) -> str:
        """``FILE:LINE < FILE:LINE what``: where the caller is, and its caller in another file."""
        places = self._places(sys._getframe(1))
        if not places:  # a thread of autograd, for which the main one waits
            places = self._places(sys._current_frames()[threading.main_thread().ident or 0])
        return f"{' < '.join(places) or '(unknown)'} {what}"

    def _places(self, frame: FrameType | None) -> list[str]:
        found: dict[str, str] = {}
        backward = False
        while frame is not None and len(found) < 2:
            file = frame.f_code.co_filename
            if not found and file.endswith("torch/autograd/graph.py"):
                backward = True
            if file.startswith(self._root):
                name = file.removeprefix(self._root)
                if not name.startswith((".venv/", "benchmarks/")):
                    found.setdefault(name, f"{name}:{frame.f_lineno}")
            frame = frame.f_back
        first, *others = list(found.values()) or [""]
        if not first:
            return []
        return [f"backward of {first}" if backward else first, *others]
