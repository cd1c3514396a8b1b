"""Whether a run reads pyramids at all, so that its data can be prepared without a guide."""

from __future__ import annotations

import torch

from dinogen.config import Config
from dinogen.families.registry import family_class
from shards.format.sample import VECTORS


def makes_pyramids(config: Config) -> bool:
    """Whether data for a run get pyramids, as ``prepare.pyramids.make`` says.

    Raises:
        ConfigError: there is no such family, or an option of it is wrong.
    """
    make = config.prepare.pyramids.make
    return make == "always" or (make == "auto" and reads_pyramids(config))


def makes_features(config: Config) -> bool:
    """Whether data for a run get any levels: pyramids, or embeddings because of ``clip:``.

    Raises:
        ConfigError: there is no such family, or an option of it is wrong.
    """
    return config.clip is not None or makes_pyramids(config)


def reads_pyramids(config: Config) -> bool:
    """Whether the family reads a level of a guide in any stage.

    Its networks take no memory on ``meta``.

    Raises:
        ConfigError: there is no such family, or an option of it is wrong.
    """
    cls, nowhere = family_class(config.family), torch.device("meta")
    with nowhere:
        levels = [cls(config, stage, nowhere).inputs.levels for stage in config.stages]
    return any(level not in VECTORS for stage in levels for level in stage)
