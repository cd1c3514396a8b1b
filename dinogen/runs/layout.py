"""The names in the folder of a run, RUN/RxR/...: built and parsed here, and nowhere else.

Nothing of ours is imported here, so that also what lies below the rest, such as the config, can ask
what a folder is. Everything else goes through :class:`dinogen.Run`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# in RUN
CONFIG, PAGE, LOCK = "config.yaml", "index.html", ".lock"
TABLE = "stats.csv"
# in RUN: what is sent to W&B, MLflow or Trackio, and how far that is
SENT = "logging"
# in RUN/RxR: files
RESULT, STATS, METRICS = "result.json", "stats.jsonl", "metrics.jsonl"
EVALUATION, SWEEP = "evaluation.json", "checkpoints.jsonl"
HEALTH = "health.jsonl"
# in RUN/RxR: folders, and the file that says what lies in them
CHECKPOINTS, STATE = "checkpoints", "state.json"
VISUALIZATIONS, VISUALIZATIONS_INDEX = "visualizations", "visualizations.json"
TENSORBOARD = "tb"
# in RUN, what `dinogen sample` draws; in RUN/RxR, what is drawn while the stage trains
SAMPLES = "samples"
# in RUN: what `dinogen project` finds, and what `dinogen video` draws
PROJECTIONS, VIDEOS = "projections", "videos"
# of the files of `dinogen export`, wherever they are; and the one key of their metadata: several
# would lie in another order each time, and the same checkpoint would give other bytes
EXPORTED_SUFFIX, EXPORTED_INFO = ".safetensors", "dinogen"
# in the folder of a study, two levels above its runs
STUDY = "study.json"

_STAGE = re.compile(r"([1-9][0-9]{0,5})x\1")
_CHECKPOINT = re.compile(r"[0-9]+")
# Any of these tells the folder of a stage from one of images: photos that were shrunk to 64x64
# often lie in a folder of that name.
_OF_A_STAGE = (CHECKPOINTS, STATS, RESULT)


def stage_name(resolution: int) -> str:
    """Name of the folder of a stage, and of the stage in messages: ``64x64``."""
    return f"{resolution}x{resolution}"


def stage_resolution(name: str) -> int | None:
    """Resolution of the stage whose folder has this name; None if it is not the name of one."""
    return int(name.partition("x")[0]) if _STAGE.fullmatch(name) else None


def checkpoint_name(nimg: int) -> str:
    """Name of the folder of a checkpoint, and of a sample grid: ``000012800``."""
    return f"{nimg:09d}"


def checkpoint_nimg(name: str) -> int | None:
    """Images seen at the checkpoint whose folder has this name; None if it is not one's."""
    return int(name) if _CHECKPOINT.fullmatch(name) else None


def has_stages(folder: Path) -> bool:
    """Whether a folder holds a stage that has begun.

    Raises:
        OSError: the folder cannot be listed.
    """
    return any(
        stage_resolution(one.name) is not None
        and any((one / name).exists() for name in _OF_A_STAGE)
        for one in folder.iterdir()
    )


def parse_checkpoint(path: Path) -> tuple[Path, int, int] | None:
    """Run, resolution and images seen of ``RUN/RxR/checkpoints/NIMG``; None for other paths."""
    if len(path.parents) < 3:
        return None
    parent, stage, run = path.parents[:3]
    nimg, resolution = checkpoint_nimg(path.name), stage_resolution(stage.name)
    if parent.name != CHECKPOINTS or nimg is None or resolution is None:
        return None
    return run, resolution, nimg


def file_mark(facts: Mapping[str, Any]) -> str:
    """Part of file names that says loudly when a random guide, which teaches nothing, was used."""
    return ".random-guide" if facts.get("random_guide") else ""


def is_exported(place: Path) -> bool:
    """Whether a place is a file, as those of ``dinogen export``, and not the folder of a run."""
    return place.is_file() or (place.suffix == EXPORTED_SUFFIX and not place.is_dir())
