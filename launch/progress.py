"""How far the stages of a run are, from the files in its folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dinogen.config import Config, StageConfig
from dinogen.errors import UserError
from dinogen.report.stats import read_stats


def end_of(config: Config, stage: StageConfig) -> int:
    """Number of images, since the first stage began, that a run has seen when a stage is done."""
    sizes = [round(one.kimg * 1000) for one in config.stages if one.resolution <= stage.resolution]
    return sum(sizes)


def stage_result(config: Config, stage: StageConfig) -> dict[str, Any] | None:
    """result.json of a stage that is done; None if it is not, or has to go on further now."""
    path = _folder(config, stage) / "result.json"
    try:
        result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return result if result.get("nimg", -1) >= end_of(config, stage) else None


def is_evaluated(config: Config, stage: StageConfig) -> bool:
    """Whether a stage that is done was measured at its end."""
    result = stage_result(config, stage)
    path = _folder(config, stage) / "evaluation.json"
    try:
        measured = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return result is not None and measured.get("nimg") == result["nimg"]


def num_images(config: Config, stage: StageConfig) -> int | None:
    """Images that the run had seen at the newest log line of a stage; None before the first."""
    try:
        return int(read_stats(_folder(config, stage) / "stats.jsonl")[-1]["nimg"])
    except UserError:
        return None


def _folder(config: Config, stage: StageConfig) -> Path:
    return config.run / f"{stage.resolution}x{stage.resolution}"
