"""What a stage leaves for people: sample grids, real faces, the curve, result.json."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dinogen.distributed import process_group
from dinogen.errors import UserError
from dinogen.families.abilities import facts_of
from dinogen.files import write_json
from dinogen.report.curves import plot_loss_curve
from dinogen.report.images import save_grid
from dinogen.runs.layout import file_mark
from dinogen.training.checkpointing.checkpoint import versions
from dinogen.training.logging.sinks.tensorboard import write_summary
from dinogen.training.state import StageState

log = logging.getLogger(__name__)


def save_samples(images: Tensor, path: Path) -> None:
    """Write a grid of samples (N, 3, R, R) in [-1, 1]."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_grid(images.numpy(), path)


def finish_stage(state: StageState, last_line: dict[str, Any]) -> dict[str, Any]:
    """Write the final images and numbers of a finished stage; rank 0 only.

    Args:
        state: of the finished stage.
        last_line: the newest line of stats.jsonl, whose numbers the result repeats.

    Returns:
        The result, as written.
    """
    place, folder = state.place, state.folder
    facts = facts_of(state.family)
    name = f"{place.name}{file_mark(facts)}"
    files = {
        "final": f"final_{name}.png",
        "real": f"real_{place.name}.png",
        "loss_curve": f"loss_curve_{name}.png",
    }
    save_samples(state.sample(state.config.log.num_samples), folder / files["final"])
    save_grid(_real_images(state), folder / files["real"])
    title = f"{place.name}, {facts.get('guide_label', state.config.family.name)}"
    try:
        plot_loss_curve(place.stats_file, folder / files["loss_curve"], title=title)
    except UserError as error:
        log.warning("no loss curve: %s", error)
        del files["loss_curve"]
    progress = state.progress
    network = state.family.networks[state.family.ema_networks[0]]
    result = {
        "stage": place.resolution,
        "resolution": place.resolution,
        "family": state.config.family.name,
        "status": "finished",
        "nimg": progress.nimg,
        "loss": progress.loss,
        "floor": last_line.get("floor"),
        "loss_over_floor": last_line.get("loss_over_floor"),
        "diversity": last_line.get("diversity"),
        "ended_early": state.ended_early,
        "best": progress.best,
        "best_nimg": progress.best_nimg,
        "health": progress.health,
        "warnings": progress.warnings,
        **facts,
        "images_per_s": (progress.nimg - state.plan.start) / max(progress.seconds, 1e-9),
        "data_wait": last_line.get("data_wait"),
        "num_skipped": progress.num_skipped,
        "seconds": progress.seconds,
        "training_s": progress.training_s,
        "peak_memory_mb": last_line.get("peak_memory_mb"),
        "num_parameters": sum(p.numel() for p in network.parameters()),
        "device": _device_name(state.device),
        "precision": state.engine.precision,
        "world_size": process_group.world_size(),
        "versions": versions(),
        "files": files,
    }
    write_json(place.result_file, result)
    write_summary(place)
    return result


def _real_images(state: StageState) -> np.ndarray:
    """As many real images as a grid holds, spread over the split: (N, 3, R, R) in [-1, 1]."""
    split = state.config.data.split
    num_real = state.data.num_samples(split)
    chosen = np.linspace(0, num_real - 1, min(num_real, state.config.log.num_samples)).astype(int)
    # A damaged image is named in the log, and costs no finished stage.
    batch = state.data.read(
        chosen.tolist(), split=split, image_size=state.stage.resolution, on_error="skip"
    )
    images: np.ndarray = batch["image"].numpy()
    return images


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
