"""What `dinogen evaluate` prints: figures a line each, and what is not available by its reason."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dinogen.metrics.names import GUIDE_DIVERSITY
from dinogen.report.cautions import FEW

HELD_OUT = "held_out"


def lines_of(part: dict[str, Any]) -> Iterator[str]:
    """Lines for people of a part of an evaluation.json, as it becomes known.

    Args:
        part: what the checkpoint or folder is, or figures that were just measured.
    """
    if "resolution" in part:
        yield _title(part)
        yield from _own(part)
    for name, figure in (part.get("measured") or {}).items():
        if figure["value"] is not None:
            yield f"  {_figure(name, figure, part.get('fingerprints') or {})}"


def closing_lines(result: dict[str, Any]) -> Iterator[str]:
    """What is left to say when all is measured: what is old, and what is not available.

    Args:
        result: a whole evaluation.json.
    """
    before = set(result.get("measured_before") or ())
    prints = result.get("fingerprints") or {}
    measured = result["measured"]
    if HELD_OUT in before:
        # of a probe for guide_diversity alone all else was told when it was found
        probed = GUIDE_DIVERSITY in measured and GUIDE_DIVERSITY not in before
        for line in _own(result):
            if not probed or line.startswith(f"  {HELD_OUT}/"):
                yield f"{line} (measured before)"
    for name, figure in measured.items():
        if name in before and figure["value"] is not None:
            yield f"  {_figure(name, figure, prints)} (measured before: {figure.get('command')})"
    missing: dict[str, list[str]] = {}
    for name, reason in (result.get("not_measured") or {}).items():
        missing.setdefault(reason, []).append(name)
    for name, figure in measured.items():
        if figure["value"] is None and name not in before:
            missing.setdefault(figure["reason"], []).append(name)
    for reason, names in missing.items():
        yield f"  not available: {', '.join(names)}: {reason}"


def measured_now(result: dict[str, Any]) -> list[str]:
    """Names of what this command has measured, ``held_out`` among them."""
    before = set(result.get("measured_before") or ())
    found = [name for name, one in result["measured"].items() if one["value"] is not None]
    if result.get("metrics"):
        found.append(HELD_OUT)
    return [name for name in found if name not in before]


def _title(result: dict[str, Any]) -> str:
    size = f"{result['resolution']}x{result['resolution']}"
    if "nimg" not in result:
        return f"{result['num_samples']} images of {size} in {result['folder']}"
    taught = result.get("guide_label")
    said = f"stage {size} at {result['nimg']} images"
    if result.get("num_samples"):
        said += f", {result['num_samples']} samples of {result['split']}"
    return said + (f", guide: {taught}" if taught else "")


def _own(result: dict[str, Any]) -> Iterator[str]:
    """What the family measures of itself."""
    num = result.get("num_samples") or 0
    for name, value in (result.get("metrics") or {}).items():
        few = name.startswith("held_out/") and num < FEW
        caution = f" (CAUTION: from only {num:,} held-out samples)" if few else ""
        yield f"  {name}: {'not finite' if value is None else f'{value:.6g}'}{caution}"
    if "verdict" in result:
        yield f"  {' '.join(result.get('warnings') or ()) or result['verdict']}"
    if result.get("num_skipped"):
        yield f"  {result['num_skipped']} damaged samples were left out"


def _figure(name: str, figure: dict[str, Any], fingerprints: dict[str, Any]) -> str:
    """``fid: 12.3 +- 0.4 (5000 images against 700, fingerprint 0123456789ab)``."""
    spread = "" if figure["spread"] is None else f" +- {figure['spread']:.2g}"
    behind = f"{figure['num_samples']} images"
    if figure["num_reference"] is not None:
        behind += f" against {figure['num_reference']}"
    mark = figure["fingerprint"]
    if mark is not None:
        behind += f", fingerprint {mark}"
        if (fingerprints.get(mark) or {}).get("random"):
            behind += ", by a RANDOM judge: it means nothing"
    if figure.get("caution"):
        behind += f"; CAUTION: {figure['caution']}"
    return f"{name}: {figure['value']:.6g}{spread} ({behind})"
