"""What a job would refuse at its start, found before it is queued or started."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from dinogen import hub
from dinogen.config import Config, ConfigError, find_stage, with_lengths
from dinogen.errors import UserError
from dinogen.evaluation.subject import chosen_samples
from dinogen.evaluation.validate import Measurable
from dinogen.families.registry import resolve
from dinogen.features.clip import load_clip
from dinogen.features.load import load_guide
from dinogen.prepare.latents import LatentMaker
from dinogen.training.data import makes_pyramids, open_data
from dinogen.training.preflight import check_config, check_run
from shards.errors import ShardsError
from shards.read.dataset import Dataset

log = logging.getLogger(__name__)

OPTION = "--unchecked"
_CPU = torch.device("cpu")


def check_run_here(config: Config, ranks: Mapping[int, int], packed: bool = True) -> None:
    """Check a run against the data, the weights and the number of ranks, as its jobs will.

    Networks take no memory; guides and feature extractors are loaded, since only their weights show
    whether they made the data.

    Args:
        config: the whole run, resolved.
        ranks: number of processes by resolution of the stages that are to be trained.
        packed: whether the data are there; a job makes them otherwise.

    Raises:
        UserError: naming the key or the file, the remedy, and the option that leaves this out.
    """
    try:
        indices = [find_stage(config, size) for size in ranks]
        if packed:
            _check_with_data(config, indices, ranks)
        else:
            check_config(config, indices, ranks)
            _check_makers(config)
    except (UserError, ShardsError, OSError) as error:
        raise UserError(
            f"{error}\n(found before anything was started; {OPTION} starts without this check, for "
            "paths that only the compute nodes see)"
        ) from error


def why_refused(config: Config, resolutions: Sequence[int]) -> str | None:
    """Why a run cannot work here; None if it can.

    Args:
        config: the whole run.
        resolutions: of the stages that are to be trained.
    """
    try:
        config = resolve(config)
        indices = [find_stage(config, size) for size in resolutions]
        _check_with_data(config, indices, dict.fromkeys(resolutions, 1))
    except (UserError, ShardsError, OSError) as error:
        return f"cannot work here: {error}"
    return None


def _check_with_data(config: Config, indices: Sequence[int], ranks: Mapping[int, int]) -> None:
    config = hub.pinned(config, resolve=False)  # as the run that has begun
    data = open_data(config)
    config = with_lengths(config, data.num_samples(config.data.split))
    families = check_run(config, list(indices), data, ranks=ranks)
    chosen_samples(data, config.data.split, 1, "data.split")
    _check_files(config, data)
    if not indices:
        return
    # The stages of a run share guide and data, so the first stands for all.
    family = families[indices[0]]
    family.device = _CPU  # of guides; its networks stay on meta
    try:
        family.begin(data)
        if config.eval.every_kimg is not None:
            found = Measurable(family, family.networks, data, _CPU)
            for name, reason in found.missing.items():
                log.warning("NOT MEASURED: %s: %s", name, reason)
    except NotImplementedError as error:  # a family of one's own that reads its networks there
        log.warning(
            "guide and weights are not checked: %s needs its networks (%s)",
            config.family.name,
            error,
        )


def _check_files(config: Config, data: Dataset) -> None:
    """Each shard in a local folder is there and whole, as far as its size tells."""
    for one in data.sets:
        if "://" in one.location or config.data.on_error == "skip":
            continue
        for shard in one.manifest.shards:
            path = Path(one.location) / shard.name
            if not path.is_file():
                raise ConfigError(
                    f"data.path: {path} is missing: copy it again, or `dinogen shards repair "
                    f"{one.location}`"
                )
            if path.stat().st_size != shard.num_bytes:
                raise ConfigError(
                    f"data.path: {path} has {path.stat().st_size:,} bytes and should have "
                    f"{shard.num_bytes:,}: copy it again, or `dinogen shards repair {one.location}`"
                )


def _check_makers(config: Config) -> None:
    """What makes the levels of data that are not there yet."""
    if makes_pyramids(config):
        for guide in (config.guide, *config.guides.values()):
            load_guide(guide)
    if config.clip is not None:
        load_clip(config.clip, _CPU)
    if config.prepare.latents is not None:
        LatentMaker.load(config.prepare.latents, _CPU).check_size(config.prepare.faces.size)
