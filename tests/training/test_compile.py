"""engine.compile, where a phase takes derivatives of derivatives, which compiled code cannot."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from dinogen.config import ConfigError
from dinogen.families.wgan_gp import WganGp
from dinogen.features.dinov2 import Dinov2Guide
from dinogen.training.checkpointing.snapshot import load_snapshot
from dinogen.training.engines import base
from dinogen.training.run import train
from tests.families.stored_latents import posteriors, write_autoencoder
from tests.families.tiny import TINY, discs, pack_discs, tiny_config
from tests.training.helpers import weights


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """Runs of two steps; everything of torch.compile but the generated code."""
    # of no guide: what those compare that run none
    draw = np.random.default_rng(0).standard_normal
    shapes = {"n4": (16, 32), "n16": (256, 32)}
    levels = [{name: draw(shape) for name, shape in shapes.items()} for _ in range(24)]
    autoencoder = write_autoencoder(tmp_path)
    for own, pixels in zip(levels, discs(24), strict=True):
        own |= posteriors(autoencoder, pixels)
    latents = dict.fromkeys(("latents", "latents_flipped"), autoencoder.info)
    pack_discs(tmp_path / "discs", levels, guides=latents)
    monkeypatch.setattr(base, "COMPILER", "aot_eager")
    torch.compiler.reset()

    def make(family, *overrides):
        run = tmp_path / f"{family}{len(overrides)}"
        return tiny_config(family, tmp_path / "discs", run, "stages.0.kimg=0.016", *overrides)

    yield make
    torch.compiler.reset()


def assert_same(compiled, plain):
    """Same weights under the same names."""
    left, right = weights(compiled, 16), weights(plain, 16)
    assert left.keys() == right.keys()
    for name, value in right.items():
        torch.testing.assert_close(left[name], value, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("family", [n for n in sorted(TINY) if not n.startswith("guided")])
def test_it_trains_as_without_it(tiny, family):
    plain, compiled = tiny(family), tiny(family, "engine.compile=true")
    train(plain)
    train(compiled)
    assert_same(compiled, plain)
    assert load_snapshot(compiled.run).sample(2, seed=0).shape == (2, 3, 16, 16)


def test_guides_are_compiled_and_penalties_go_through_them(make_config, monkeypatch):
    monkeypatch.setattr(base, "COMPILER", "aot_eager")
    torch.compiler.reset()
    projected = "{kind: projected, from_resolution: 4, r1: 1.0, every: 2, penalty_on: pixels}"
    same = [
        "stages.0.kimg=0.016",
        "stages.1.kimg=0.016",
        "stages.1.fade_kimg=0.008",
        f"family.discriminator={projected}",
    ]
    plain = make_config(*same, run="plain")
    compiled = make_config(*same, "engine.compile=true", run="compiled")
    seen = []
    compiling = Dinov2Guide.compile

    def noted(self, **how):
        seen.append(how)
        compiling(self, **how)

    monkeypatch.setattr(Dinov2Guide, "compile", noted)
    train(plain)
    assert not seen
    train(compiled)
    assert len(seen) == 2  # once a stage, though G's objective and D share it
    for resolution in (4, 8):
        left, right = weights(compiled, resolution), weights(plain, resolution)
        for name, value in right.items():
            torch.testing.assert_close(left[name], value, rtol=1e-3, atol=1e-4, msg=name)


def test_a_family_that_does_not_say_so_is_one_line(tiny, monkeypatch):
    phases = WganGp.phases.fget
    silent = property(
        lambda self: tuple(dataclasses.replace(p, second_order=False) for p in phases(self))
    )
    monkeypatch.setattr(WganGp, "phases", silent)
    with pytest.raises(ConfigError, match=r"engine.compile: phase D .*second_order=True"):
        train(tiny("wgan_gp", "engine.compile=true"))
