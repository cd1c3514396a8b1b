"""How far the stages of a run are, from the files in its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dinogen.config import Config, ConfigError, StageConfig, load_config
from dinogen.runs.files import (
    EVALUATION,
    RESULT,
    STATS,
    read_evaluation,
    read_lines,
    read_result,
    read_visualizations,
)


def end_of(config: Config, stage: StageConfig) -> int | None:
    """Number of images, since the first stage began, that a run has seen when a stage is done.

    None while a length in epochs is not known: the run writes it down when it begins.
    """
    sizes = [_length(config, one) for one in config.stages if one.resolution <= stage.resolution]
    known = [size for size in sizes if size is not None]
    return sum(known) if len(known) == len(sizes) else None


def stage_result(config: Config, stage: StageConfig) -> dict[str, Any] | None:
    """result.json of a stage that is done; None if it is not, or has to go on further now."""
    result = read_result(_folder(config, stage) / RESULT).value
    if result is None or result.get("nimg") is None:
        return None
    end = end_of(config, stage)
    done = result.get("ended_early") or (end is not None and result["nimg"] >= end)
    return result if done else None


def is_evaluated(config: Config, stage: StageConfig) -> bool:
    """Whether a stage that is done was measured at its end."""
    return _evaluation(config, stage) is not None


def figure_of(config: Config, stage: StageConfig, metric: str) -> dict[str, Any] | None:
    """What a metric came to at the end of a stage, as in evaluation.json; None if not measured.

    Its ``value`` is None where the metric is not available; ``reason`` then says why.
    """
    measured = (_evaluation(config, stage) or {}).get("measured") or {}
    figure: dict[str, Any] | None = measured.get(metric)
    return figure


def is_visualized(config: Config, stage: StageConfig) -> bool:
    """Whether the pictures of `dinogen look` are of the end of a stage."""
    result = stage_result(config, stage)
    looks = read_visualizations(_folder(config, stage) / "looks" / "looks.json").value
    return result is not None and any(one.get("nimg") == result["nimg"] for one in looks.values())


def num_images(config: Config, stage: StageConfig) -> int | None:
    """Images that the run had seen at the newest log line of a stage; None before the first."""
    lines = read_lines(_folder(config, stage) / STATS).value
    return lines[-1]["nimg"] if lines else None


def _length(config: Config, stage: StageConfig) -> int | None:
    """Images of one stage; where the config says epochs, as the run has worked them out."""
    if stage.kimg is not None:
        return stage.num_images
    try:
        written = load_config(config.run / "config.yaml").stages
    except ConfigError:
        return None
    same = (one for one in written if one.resolution == stage.resolution)
    found = next((one for one in same if one.epochs == stage.epochs), None)
    return None if found is None or found.kimg is None else found.num_images


def _evaluation(config: Config, stage: StageConfig) -> dict[str, Any] | None:
    """evaluation.json of a stage that is done, if it was measured at its end."""
    result = stage_result(config, stage)
    measured = read_evaluation(_folder(config, stage) / EVALUATION).value
    if result is None or measured is None or measured.get("nimg") != result["nimg"]:
        return None
    return measured


def _folder(config: Config, stage: StageConfig) -> Path:
    return config.run / f"{stage.resolution}x{stage.resolution}"
