"""Draws the visualizations of a checkpoint: RUN/RxR/visualizations/*.png and their index."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dinogen.errors import UserError
from dinogen.evaluation.record import check_changes
from dinogen.files import why_not_writable, write_json
from dinogen.hub import shown, working_path
from dinogen.report.images import save_animation, save_sheet
from dinogen.runs.layout import VISUALIZATIONS_INDEX
from dinogen.runs.values import existing
from dinogen.training.checkpointing.snapshot import load_snapshot
from dinogen.training.logging.sinks.senders import show_results
from dinogen.visualize import drawings
from dinogen.visualize.drawings import FRAME_SECONDS, History
from dinogen.visualize.scene import LeftOut, Maker, Scene
from shards.errors import ShardsError

log = logging.getLogger(__name__)


def write_visualizations(
    run: Path | str,
    resolution: int | None = None,
    nimg: int | None = None,
    seed: int = 0,
    out: Path | None = None,
    places: Sequence[str] = (),
) -> Path:
    """Draw every visualization that the run's family has, one after the other.

    TensorBoard also shows those in the run's own folder.

    Args:
        run: folder of the run, a file of ``dinogen export``, or an address of the hub.
        resolution: which stage; the largest that has a checkpoint unless given.
        nimg: which checkpoint, by images seen; the newest unless given.
        seed: of all latents; give the same one for runs that are to be compared.
        out: folder; ``RUN/RxR/visualizations`` unless given.
        places: ``KEY=VALUE`` changes to where data and guides are now, such as ``data.path=``.

    Returns:
        visualizations.json: by name ``file`` (beside it), ``caption``, ``nimg``, ``seed`` and
        ``command``; where ``file`` is null, ``reason`` says why.

    Raises:
        ConfigError: no such run or checkpoint.
        UserError: the folder cannot be written; raised before anything is drawn.
    """
    check_changes(tuple(places))
    run = working_path(run)
    snapshot = load_snapshot(run, resolution, nimg, places)
    scene = Scene(snapshot, seed)
    folder = out or snapshot.place.visualizations_folder
    index = existing(folder, VISUALIZATIONS_INDEX)
    command = f"dinogen look {shlex.quote(shown(run))} --stage {snapshot.resolution}"
    command += f" --nimg {snapshot.nimg} --seed {seed}"
    if out is not None:
        command += f" --out {shlex.quote(str(out))}"
    if problem := why_not_writable(index, make=True):
        raise UserError(f"{folder}: cannot be written: {problem}: give --out FOLDER")
    entries: dict[str, dict[str, Any]] = {}
    for name, maker in _makers(scene).items():
        entry: dict[str, Any] = {"nimg": snapshot.nimg, "seed": seed, "command": command}
        try:
            visual = maker(scene)
        except (LeftOut, UserError, ShardsError) as reason:
            # a damaged sample too: visualizations that do not read it can still be drawn
            note = log.info if isinstance(reason, LeftOut) else log.warning
            note("%s is left out: %s", name, reason)
            entries[name] = {"file": None, "caption": None, "reason": str(reason)} | entry
            continue
        animated = len(visual.sheets) > 1
        stem = name.removesuffix("_animated") + snapshot.mark
        path = folder / f"{stem}.{'gif' if animated else 'png'}"
        if animated:
            save_animation(visual.sheets, path, FRAME_SECONDS)
        else:
            save_sheet(visual.sheets[0], path)
        log.info("%s: %s", name, path)
        entries[name] = {"file": path.name, "caption": visual.caption} | entry
    write_json(index, entries)
    if out is None:
        show_results(snapshot.place)
    return index


def _makers(scene: Scene) -> dict[str, Maker]:
    """What draws each visualization, in the order in which they are shown."""
    history = History(scene)
    return {
        "grid16": drawings.grid16,
        "grid64": drawings.grid64,
        "progression": history.progression,
        "progression_animated": history.animation,
        "interpolation_linear": drawings.interpolation_linear,
        "interpolation_spherical": drawings.interpolation_spherical,
        "psi": drawings.psi,
        "styles": drawings.styles,
        "directions": drawings.directions,
        "reconstructions": drawings.reconstructions,
        "variations": drawings.variations,
        "worst": drawings.worst,
        "neighbours": drawings.neighbours,
    }
