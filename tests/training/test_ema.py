"""The moving average's half-life, against its definition."""

import pytest
import torch
from torch import nn

from dinogen.config import EmaConfig
from dinogen.training.checkpointing.snapshot import Ema, ema_decay


def test_after_a_half_life_half_of_the_old_weight_is_left():
    config = EmaConfig(halflife_kimg=1.0, rampup=1e9)
    weight = 1.0
    for step in range(1, 101):
        weight *= ema_decay(10, nimg=10 * step, config=config)
    assert weight == pytest.approx(0.5)


def test_the_ramp_up_shortens_the_half_life_early_on():
    config = EmaConfig(halflife_kimg=10.0, rampup=0.05)
    assert ema_decay(64, nimg=6400, config=config) == pytest.approx(0.5 ** (64 / 320))
    assert ema_decay(64, nimg=10**7, config=config) == pytest.approx(0.5 ** (64 / 10000))
    assert ema_decay(64, nimg=0, config=config) == 0


def test_update_moves_weights_and_copies_buffers():
    source = nn.BatchNorm1d(2)
    ema = Ema({"G": source}, EmaConfig(halflife_kimg=0.064, rampup=1e9))
    with torch.no_grad():
        source.weight.fill_(3.0)
        source.running_mean.fill_(5.0)
    ema.update(64, 1e6)
    average = ema.networks["G"]
    torch.testing.assert_close(average.weight, torch.full((2,), 2.0))  # half of 1, half of 3
    assert torch.equal(average.running_mean, torch.full((2,), 5.0))
    assert not any(p.requires_grad for p in average.parameters())
