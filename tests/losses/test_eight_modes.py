"""Eight modes on a circle: objectives between distributions cover them, mse provably does not."""

import math

import pytest
import torch
from torch import nn

from dinogen.guidance.objectives import Drift, Energy, Mmd, SlicedWasserstein

RADIUS, SPREAD, NUM_STEPS, BATCH, LR = 2.0, 0.1, 500, 128, 0.01
ANGLES = torch.arange(8) * (2 * math.pi / 8)
MODES = RADIUS * torch.stack([ANGLES.cos(), ANGLES.sin()], 1)

TERMS = [
    Energy(views=("global",)),
    Mmd(views=("global",), bandwidths=(0.1, 0.3, 1.0)),
    SlicedWasserstein(views=("global",)),
    Drift(widths=(0.05, 0.1, 0.3)),
]


def reals(num, generator):
    chosen = torch.randint(8, (num,), generator=generator)
    return MODES[chosen] + SPREAD * torch.randn(num, 2, generator=generator)


def trained(loss):
    """Points of a small generator that was trained with ``loss(generated, real, directions)``."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    G = nn.Sequential(
        nn.Linear(2, 64), nn.LeakyReLU(0.2), nn.Linear(64, 64), nn.LeakyReLU(0.2), nn.Linear(64, 2)
    )
    optimizer = torch.optim.Adam(G.parameters(), lr=LR, betas=(0.5, 0.99))

    def directions(size, number):
        return torch.randn(size, number, generator=generator)

    for step in range(NUM_STEPS):
        for group in optimizer.param_groups:
            group["lr"] = LR * (1 - step / NUM_STEPS)
        generated = G(torch.randn(BATCH, 2, generator=generator))
        optimizer.zero_grad()
        loss(generated, reals(BATCH, generator), directions).backward()
        optimizer.step()
    with torch.no_grad():
        return G(torch.randn(4000, 2, generator=generator))


def shares(points):
    """What share of the points is near each mode."""
    near = torch.cdist(points, MODES) < 0.25 * RADIUS
    return near.float().mean(0)


@pytest.mark.parametrize("term", TERMS, ids=lambda term: term.name)
def test_it_covers_all_eight(term):
    def loss(generated, real, directions):
        return term.compare_sets(generated[None], real[None], directions)[0]

    found = shares(trained(loss))
    # A small continuous map leaves some between the modes; every mode has to have a third of what
    # is its due, and none much more than others.
    assert found.min() > 1 / 24, found
    assert found.max() < 2 * found.min(), found


def test_mse_ends_at_their_mean():
    """E|g - r|^2 = E|g - mean|^2 + const: the best answer is the mean, where there is no mode."""
    points = trained(lambda generated, real, _: (generated - real).square().mean())
    assert shares(points).sum() == 0
    assert points.norm(dim=1).max() < 0.5 * RADIUS
