"""The data that runs of a study lack, and which of its configs prepares them for all."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from dinogen.config import Config
from dinogen.errors import UserError
from launch.slurm.plan import data_paths, lacking_data
from launch.study.plan import Study
from launch.study.runs import StudyRun
from shards.format.sample import LATENTS, OF_LATENTS, VECTORS, flipped_guide, level_guide


@dataclass(frozen=True)
class Needs:
    """What a config needs of its data, and what its own preparation makes.

    Attributes:
        made: key that makes it by feature: a level, or ``latents`` of any side; and the network.
        read: the same of what its family reads.
        size: side of the images that it makes.
        largest: side of the largest images that it trains on.
        holds_out: whether it makes a val split.
    """

    made: Mapping[str, tuple[str, str]]
    read: Mapping[str, tuple[str, str]]
    size: int
    largest: int
    holds_out: bool

    def lacking(self, other: Needs) -> list[str]:
        """Keys of ``prepare`` and guides that would have to change to serve another config too."""
        lacking = [
            f"{key} ({feature})"
            for feature, (key, network) in other.read.items()
            if self.made.get(feature, ("", ""))[1] != network
        ]
        if self.size < other.largest:
            lacking.append(f"prepare.faces.size ({other.largest})")
        if other.holds_out and not self.holds_out:
            lacking.append("prepare.pack.val_fraction")
        return lacking


def lacking(study: Study, run: StudyRun) -> str | None:
    """The data that a run lacks and how to make them; None if they exist."""
    paths = lacking_data(run.config)
    if not paths:
        return None
    if run.config.data.mix:
        return f"data.mix: {paths[0]} holds no packed data: pack each part of the mix first"
    sharing = {one.source: one for one in (*study.runs, run) if data_paths(one.config) == paths}
    source, lacks = _serves_all(list(sharing.values()))
    command = f"dinogen prepare PHOTOS {paths[0]} -c {source}"
    if not lacks:
        return f"data.path: {paths[0]} holds no packed data: {command}"
    return (
        f"data.path: {paths[0]} holds no packed data, and no config of the study prepares them for "
        f"all that read them. {source} lacks {'; '.join(lacks)}: add these to it, then {command}; "
        "or give the others a data.path of their own"
    )


def _serves_all(runs: Sequence[StudyRun]) -> tuple[Path, list[str]]:
    """The config to prepare with, and what it lacks of the others, in words.

    Of several that lack the least it is the one that makes the most levels, then the first of the
    plan.
    """
    if len(runs) == 1:
        return runs[0].source, []  # `dinogen prepare` itself says what does not fit
    try:
        needs = {run.source: needs_of(run.config) for run in runs}
    except UserError:  # an option of a family: the run says it
        return runs[-1].source, []
    lacks = {
        source: [
            f"{', '.join(keys)} for {other}"
            for other, theirs in needs.items()
            if (keys := mine.lacking(theirs))
        ]
        for source, mine in needs.items()
    }
    best = min(needs, key=lambda source: (len(lacks[source]), -len(needs[source].made)))
    return best, lacks[best]


def needs_of(config: Config) -> Needs:
    """What a config needs of its data, and what ``dinogen prepare`` with it makes.

    Raises:
        UserError: there is no such family, or an option of it is wrong.
    """
    same = {"run", "seed", "metrics", "eval", "log", "logging", "checkpoint", "notes"}
    return _needs_of(config.model_dump_json(exclude=same))


@cache
def _needs_of(dumped: str) -> Needs:
    from dinogen.training.data import levels_read, makes_pyramids

    config = Config.model_validate(json.loads(dumped))
    networks = _networks(config)
    made: dict[str, tuple[str, str]] = {}
    if makes_pyramids(config):
        pyramids = config.prepare.pyramids
        for name in ("", *config.guides):
            for guide in (name, flipped_guide(name)) if pyramids.flips else (name,):
                for level in (
                    f"{kind[0]}{grid}" for kind in pyramids.kinds for grid in pyramids.grids
                ):
                    feature = f"{guide}.{level}".lstrip(".")
                    made[feature] = (_key_of(feature), networks.get(name, ""))
    if config.clip is not None:
        made |= dict.fromkeys(VECTORS, ("clip", networks["clip"]))
    if config.prepare.latents is not None:
        found = OF_LATENTS if config.prepare.latents.flips else (LATENTS,)
        made |= {name: (_key_of(name), networks[LATENTS]) for name in found}
    read = {}
    for level in levels_read(config):
        guide = level_guide(level)
        feature = guide if guide in OF_LATENTS else level
        own = "clip" if level in VECTORS else LATENTS if guide in OF_LATENTS else _plain(guide)
        read[feature] = (_key_of(feature), networks.get(own, ""))
    prepare = config.prepare
    largest = max(stage.resolution for stage in config.stages)
    return Needs(made, read, prepare.faces.size, largest, prepare.pack.val_fraction > 0)


def _plain(guide: str) -> str:
    """The guide whose features of mirrored images these may be."""
    return guide.removesuffix(flipped_guide("")).removesuffix("_")


def _networks(config: Config) -> dict[str, str]:
    """What identifies each network that makes levels, by the name of its guide."""
    found = {name: guide.model_dump_json() for name, guide in config.guides.items()}
    found[""] = config.guide.model_dump_json()
    if config.clip is not None:
        found["clip"] = config.clip.model_dump_json()
    if config.prepare.latents is not None:
        found[LATENTS] = config.prepare.latents.model_dump_json(include={"path", "revision"})
    return found


def _key_of(feature: str) -> str:
    """The key that makes a feature."""
    if feature in OF_LATENTS:
        return "prepare.latents" if feature == LATENTS else "prepare.latents.flips"
    if feature in VECTORS:
        return "clip"
    guide = level_guide(feature)
    if guide.rpartition("_")[2] == flipped_guide(""):
        return "prepare.pyramids.flips"
    return f"guides.{guide}" if guide else "guide, prepare.pyramids.grids"
