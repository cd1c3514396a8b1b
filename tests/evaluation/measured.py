"""Tiny runs measured as they train, what they write, and a tiny random feature extractor."""

from __future__ import annotations

import json

from dinogen.features.dinov2 import make_random_dinov2
from tests.families.tiny import discs, tiny_config
from tests.metrics.small import pack_images


def lay_out(folder):
    """Discs with val and test, and a feature extractor beside them."""
    pack_images(folder / "data", discs(48))
    make_random_dinov2(folder / "extractor", seed=1, hidden_size=16, num_layers=1, num_heads=2)
    return folder


def settings(place):
    return [f"metrics.dinov2={place / 'extractor'}", f"metrics.cache={place / 'cache'}"]


def make(place, name, *overrides, family="dcgan"):
    measured = ["eval.every_kimg=0.016", "eval.generated=[fd_dinov2,kd_dinov2]"]
    measured += ["eval.num_generated=60"]
    return tiny_config(
        family, place / "data", place / name, *settings(place), *measured, *overrides
    )


def in_training(config):
    text = (config.run / "16x16" / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def stats(config):
    text = (config.run / "16x16" / "stats.jsonl").read_text()
    return {line["nimg"]: line for line in map(json.loads, text.splitlines())}
