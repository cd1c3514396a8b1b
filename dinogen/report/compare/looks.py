"""The pictures of a run that a comparison shows, as `dinogen look` has left them."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dinogen.runs.files import Found, read_looks_index, read_raw

MAX_BYTES = 4_000_000
TYPES = {".png": "png", ".gif": "gif", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}

# Which pictures stand under which heading, by the beginning of their names.
SECTIONS = {
    "samples": ("grid16", "grid64", "final"),
    "interpolations": ("interpolation",),
    "progress": ("progression",),
    "latents": ("psi", "styles", "directions"),
    "reconstructions": ("reconstruction",),
    "worst": ("worst",),
    "neighbours": ("neighbour",),
}


@dataclass(frozen=True)
class Look:
    """A picture, or why there is none.

    Attributes:
        name: such as ``grid16``.
        path: the file; None if it was left out.
        caption: what it shows.
        nimg: images that the run had been shown.
        seed: that it was drawn with.
        command: that draws it again.
        reason: why it was left out.
    """

    name: str
    path: Path | None
    caption: str
    nimg: int | None = None
    seed: int | None = None
    command: str | None = None
    reason: str | None = None

    @property
    def uri(self) -> str | None:
        """The file as a data URI; None if it cannot be read or it is too large for a page."""
        if self.path is None:
            return None
        kind = TYPES.get(self.path.suffix.lower())
        data = read_raw(self.path).value
        if kind is None or not 0 < len(data) <= MAX_BYTES:
            return None
        return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"

    @property
    def section(self) -> str:
        """Under which heading it stands: a key of :data:`SECTIONS`, or ``more``."""
        if self.name.endswith("_animated"):
            return "more"  # many moving pictures on one page make nobody wiser
        for section, beginnings in SECTIONS.items():
            if self.name.startswith(beginnings):
                return section
        return "more"


def read_looks(
    stage: Path, result: dict[str, Any] | None
) -> tuple[Found[dict[str, dict[str, Any]]], list[Look], list[str]]:
    """looks.json, its images, else the last grid of training; and what is missing.

    Args:
        stage: folder of the stage.
        result: its result.json, as checked.
    """
    folder = stage / "looks"
    index = read_looks_index(folder / "looks.json")
    looks = [_look(name, one, folder) for name, one in index.value.items()]
    missing = [one.path.name for one in looks if one.path and not one.path.is_file()]
    troubles = []
    if missing:
        troubles.append(f"images are missing: {', '.join(missing)}: run dinogen look again")
    if not any(one.section == "samples" and one.path for one in looks) and result:
        name = (result.get("files") or {}).get("final")
        if name and (stage / name).is_file():
            caption = "drawn at the end of training, under the seed of the run"
            looks.append(Look("final", stage / name, caption, result.get("nimg")))
    return index, looks, troubles


def _look(name: str, one: dict[str, Any], folder: Path) -> Look:
    file = one.get("file")
    return Look(
        name=name,
        path=folder / file if file else None,
        caption=one.get("caption") or name,
        nimg=one.get("nimg"),
        seed=one.get("seed"),
        command=one.get("command"),
        reason=one.get("reason"),
    )
