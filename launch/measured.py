"""What `dinogen evaluate` prints: figures a line each, and what is not to be had by its reason."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def lines_of(result: dict[str, Any]) -> Iterator[str]:
    """Lines for people of an evaluation.json."""
    yield _title(result)
    for name, value in (result.get("metrics") or {}).items():
        yield f"  {name}: {'not finite' if value is None else f'{value:.6g}'}"
    if "verdict" in result:
        yield f"  {' '.join(result['warnings']) or result['verdict']}"
    if result.get("num_skipped"):
        yield f"  {result['num_skipped']} damaged samples were left out"
    missing: dict[str, list[str]] = {}
    for name, figure in result["measured"].items():
        if figure["value"] is None:
            missing.setdefault(figure["reason"], []).append(name)
        else:
            yield f"  {_figure(name, figure, result['fingerprints'])}"
    for reason, names in missing.items():
        yield f"  not available: {', '.join(names)}: {reason}"


def _title(result: dict[str, Any]) -> str:
    size = f"{result['resolution']}x{result['resolution']}"
    if "nimg" not in result:
        return f"{result['num_samples']} pictures of {size} in {result['folder']}"
    taught = result.get("guide_label")
    return (
        f"stage {size} at {result['nimg']} images, {result['num_samples']} samples of "
        f"{result['split']}" + (f", guide: {taught}" if taught else "")
    )


def _figure(name: str, figure: dict[str, Any], fingerprints: dict[str, Any]) -> str:
    """``fid: 12.3 +- 0.4 (5000 pictures against 700, fingerprint 0123456789ab)``."""
    spread = "" if figure["spread"] is None else f" +- {figure['spread']:.2g}"
    behind = f"{figure['num_samples']} pictures"
    if figure["num_reference"] is not None:
        behind += f" against {figure['num_reference']}"
    mark = figure["fingerprint"]
    if mark is not None:
        behind += f", fingerprint {mark}"
        if fingerprints[mark]["random"]:
            behind += ", by a RANDOM judge: it means nothing"
    return f"{name}: {figure['value']:.6g}{spread} ({behind})"
