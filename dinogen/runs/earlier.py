"""Keys that earlier versions wrote into the files of a run, and what they are called today."""

from __future__ import annotations

from typing import Any

# Of result.json, evaluation.json, the progress in a checkpoint's state.json.
RENAMED = {"verdict": "health", "pictures": "images"}


def with_names_of_today(stored: dict[str, Any]) -> dict[str, Any]:
    """The same values under the names of today, in the same order; nested in ``progress`` too.

    Args:
        stored: an object as a file of a run holds it. Where it has a value under both names, the
            one of today stands.
    """
    found: dict[str, Any] = {}
    for key, value in stored.items():
        name = RENAMED.get(key, key)
        if name == key or name not in stored:
            found[name] = value
    if isinstance(progress := found.get("progress"), dict):
        found["progress"] = with_names_of_today(progress)
    return found
