"""Runs whose checkpoints were all kept, and the scenes that are drawn from them."""

from __future__ import annotations

import pytest

from dinogen.training.checkpointing.snapshot import load_snapshot
from dinogen.training.run import train
from dinogen.visualize.scene import Scene
from tests.families.tiny import pack_discs, tiny_config
from tests.training.conftest import (  # noqa: F401
    data_folder,
    guide_folder,
    make_config,
    no_downloads,
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folder of a run of four steps of a family, all of whose checkpoints were kept."""
    folder = tmp_path_factory.mktemp("visualizations")
    pack_discs(folder / "data")
    more = {
        "stylegan2_ada": ["augment.flip=0.5"],
        "ddpm": ["checkpoint.keep_last=1"],
        "ddpm_classes": ["family.num_classes=2"],
    }
    done = {}

    def run_of(family):
        if family not in done:
            keep = ["checkpoint.every_kimg=0.008", "checkpoint.keep_last=9"]
            config = tiny_config(
                family.removesuffix("_classes"),
                folder / "data",
                folder / family,
                *keep,
                *more.get(family, []),
            )
            train(config)
            done[family] = config.run
        return done[family]

    return run_of


@pytest.fixture(scope="module")
def scene_of(runs):
    """The newest checkpoint of a family's run under seed 5."""
    scenes = {}

    def make(family):
        if family not in scenes:
            scenes[family] = Scene(load_snapshot(runs(family)), 5)
        return scenes[family]

    return make
