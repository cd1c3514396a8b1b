"""Where to damage a packed dataset, and the problems that are then found in it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from shards import open_dataset
from shards.check.verify import Problem, verify
from shards.format.index import load

Flip = Callable[[Path, int], None]


def problems_of(folder: Path) -> list[Problem]:
    return verify(open_dataset(folder))


def place(folder: Path, shard: str, row: int, suffix: str) -> tuple[str, int, int]:
    """Key, offset and size of a payload."""
    index = load(folder / f"{shard}.index.npz")
    number = index.column(suffix)
    assert number is not None
    return index.key(row), int(index.offsets[row, number]), int(index.sizes[row, number])


def change_manifest(folder: Path, change: Callable[[dict], object]) -> None:
    path = folder / "manifest.json"
    manifest = json.loads(path.read_bytes())
    change(manifest)
    path.write_text(json.dumps(manifest))
