"""Tiny guided runs of every objective, for tests of what they compute on ranks and in parts."""

from __future__ import annotations

from pathlib import Path

from dinogen.config import Config
from dinogen.training.run import train
from tests.families.tiny import tiny_config

OBJECTIVES = {
    "mse": [{"name": "mse"}],
    "paired": [{"name": "paired", "normalize": True}],
    "latents": [{"name": "paired", "normalize": True, "num_latents": 17}],
    "energy": [{"name": "energy"}, {"name": "mse", "weight": 0.1, "guides": ["main"]}],
    "mmd": [{"name": "mmd", "guides": ["main"]}, {"name": "mmd", "guides": ["pixels"]}],
    "sliced_wasserstein": [{"name": "sliced_wasserstein", "num_slices": 4}],
    "drift": [{"name": "drift", "views": ["location", "global"], "widths": [0.1, 0.3]}],
}

# Discriminators that are added to an objective.
PATCH = {
    "kind": "patch",
    "from_resolution": 16,
    "weight": 1.0,
    "loss": "relativistic",
    "r1": 1.0,
    "r2": 1.0,
    "every": 2,
    "ramp_kimg": 0.016,
    "patch_scales": 1,
    "patch_layers": 1,
    "patch_channels": 8,
}
PROJECTED = {"from_resolution": 16, "head_channels": 8, "grid": 2, "ramp_kimg": 0}
ADVERSARIES = {"patch": PATCH, "projected": PROJECTED}


def adversary_config(data: Path, out: Path, name: str, *overrides: str) -> Config:
    """Four steps of 8 with energy and a discriminator."""
    given = [
        "family.objectives=[{name: energy, weight: 0.5, guides: [main]}]",
        f"family.discriminator={ADVERSARIES[name]}",
        "guides={pixels: {name: pixels}}",
    ]
    return tiny_config("guided", data, out / name, *given, *overrides)


def objective_config(data: Path, out: Path, name: str, *overrides: str) -> Config:
    """Two steps of 8 with one objective."""
    given = [
        f"family.objectives={OBJECTIVES[name]}",
        "guides={pixels: {name: pixels}}",
        "stages.0.kimg=0.016",
        "log.num_samples=1",
    ]
    return tiny_config("guided", data, out / name, *given, *overrides)


def train_all(data: Path, out: Path, ways: dict[str, list[str]]) -> None:
    """Train a run of each objective in each way: overrides by the name of a folder of ``out``."""
    for way, overrides in ways.items():
        for name in OBJECTIVES:
            train(objective_config(data, out / way, name, *overrides))


def train_adversaries(data: Path, out: Path, ways: dict[str, list[str]]) -> None:
    """Train a run with each discriminator in each way."""
    for way, overrides in ways.items():
        for name in ADVERSARIES:
            train(adversary_config(data, out / way, name, *overrides))
