"""Names in the folder of a run that earlier versions wrote, and what they are called now.

A run that an earlier version began keeps its old file names; its keys are renamed as they are read.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

RENAMED = {
    # a folder of a stage, and the file in it that lists the images
    "looks": "visualizations",
    "looks.json": "visualizations.json",
    # a key of result.json, of evaluation.json, and of `progress` in a checkpoint's state.json
    "verdict": "health",
    # a key of evaluation.json of a folder: which images were measured
    "pictures": "images",
}


def with_new_keys(value: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a file under the names of today, those of its section ``progress`` too.

    A value that has its new name already wins.
    """
    found: dict[str, Any] = {}
    for key, one in value.items():
        new = RENAMED.get(key, key)
        if new != key and new in value:
            continue
        is_progress = key == "progress" and isinstance(one, Mapping)
        found[new] = with_new_keys(one) if is_progress else one
    return found


def existing(folder: Path, name: str) -> Path:
    """``folder/name``, or what an earlier version called it if only that is there."""
    path = folder / name
    for old, new in RENAMED.items():
        if new == name and not path.exists() and (folder / old).exists():
            return folder / old
    return path
