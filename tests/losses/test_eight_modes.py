"""Eight modes on a circle: objectives between distributions cover them, mse provably does not."""

import math

import pytest
import torch
from torch import nn

from dinogen.guidance.objectives import Drift, Energy, Mmd, SlicedWasserstein
from dinogen.guidance.sets import Groups
from dinogen.networks.one_step import OneStepDiT

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


def test_a_one_step_transformer_covers_all_eight():
    """An image of 2x2 pixels, all of which have one of eight colours."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    G = OneStepDiT(2, patch=1, width=32, depth=1, num_heads=2)
    optimizer = torch.optim.Adam(G.parameters(), lr=LR, betas=(0.5, 0.99))
    objective = Drift(widths=(0.05, 0.1, 0.3))
    for step in range(250):
        for group in optimizer.param_groups:
            group["lr"] = LR * (1 - step / 250)
        generated = G(torch.randn(BATCH, 3, 2, 2, generator=generator)).flatten(2).mT
        colours = torch.cat([reals(BATCH, generator), torch.zeros(BATCH, 1)], 1)
        optimizer.zero_grad()
        real = colours[:, None].expand(-1, 4, -1).contiguous()
        objective({"p2": generated}, {"p2": real}).backward()
        optimizer.step()
    with torch.no_grad():
        images = G(torch.randn(2000, 3, 2, 2, generator=generator))
    found = shares(images.mean((2, 3))[:, :2])
    assert found.min() > 1 / 24, found
    assert found.max() < 2 * found.min(), found


def test_each_class_is_on_its_own_modes():
    """Class 0 has the first four modes, class 1 the others; both are in each batch."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    G = nn.Sequential(
        nn.Linear(4, 64), nn.LeakyReLU(0.2), nn.Linear(64, 64), nn.LeakyReLU(0.2), nn.Linear(64, 2)
    )
    optimizer = torch.optim.Adam(G.parameters(), lr=LR, betas=(0.5, 0.99))
    objective = Drift(widths=(0.05, 0.1, 0.3), normalize="together")
    labels = torch.arange(2).repeat_interleave(BATCH // 2)

    def generate(label):
        z = torch.randn(len(label), 2, generator=generator)
        return G(torch.cat([z, nn.functional.one_hot(label, 2)], 1))

    for step in range(NUM_STEPS):
        for group in optimizer.param_groups:
            group["lr"] = LR * (1 - step / NUM_STEPS)
        modes = labels * 4 + torch.randint(4, (BATCH,), generator=generator)
        real = MODES[modes] + SPREAD * torch.randn(BATCH, 2, generator=generator)
        generated = generate(labels)
        features = {"p1": generated.detach()[:, None]}
        _, gradients, _ = objective.loss_and_gradients(
            features, {"p1": real[:, None]}, lambda *_: torch.empty(0), groups=Groups(2)
        )
        optimizer.zero_grad()
        generated.backward(gradients["p1"][:, 0])
        optimizer.step()
    with torch.no_grad():
        for label in range(2):
            found = shares(generate(torch.full((2000,), label)))
            own = found[4 * label : 4 * label + 4]
            assert own.min() > 1 / 12, found
            assert found.sum() - own.sum() < 0.02, found
