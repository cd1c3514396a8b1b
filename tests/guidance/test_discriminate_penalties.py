"""Penalties of the discriminator: what is known of a linear one, through the guide, and lazily."""

import pytest
import torch
from torch import nn

from tests.guidance.discriminators import PENALTIES, SIDE, logits_by_hand, random_images


class Linear(nn.Module):
    """Logits (B, 1, 1), linear in its input; two heads for two maps."""

    def __init__(self, *shapes):
        super().__init__()
        self.weights = nn.ParameterList(torch.randn(shape) for shape in shapes)

    def forward(self, maps):
        maps = [maps] if isinstance(maps, torch.Tensor) else maps
        return [
            (x * w).sum((1, 2, 3)).view(-1, 1, 1) for x, w in zip(maps, self.weights, strict=True)
        ]


def test_penalties_of_a_linear_d_on_pixels_are_known(make):
    adversary = make("patch", augment=(), every=4, **PENALTIES)
    adversary.network = Linear((3, SIDE, SIDE))
    (w,) = adversary.network.weights
    losses, report = adversary.penalty_losses(
        random_images(), random_images(seed=1), torch.arange(6)
    )
    square = w.square().sum()
    torch.testing.assert_close(losses, {"r1": 3 / 2 * 4 * square, "r2": 5 / 2 * 4 * square})
    torch.testing.assert_close(report["r1_penalty"], square.detach())
    (gradient,) = torch.autograd.grad(losses["r2"], w)
    torch.testing.assert_close(gradient, 5 / 2 * 4 * 2 * w.detach())


def test_through_cutout_a_linear_d_s_penalty_is_that_of_what_is_left(make):
    adversary = make("patch", augment=("cutout",), every=1, r1=2.0)
    adversary.network = Linear((3, SIDE, SIDE))
    (w,) = adversary.network.weights
    # of images of ones, cutout leaves a mask
    masks = adversary._prepare(torch.ones(6, 3, SIDE, SIDE), "judge/D", torch.arange(6))
    assert masks.mean() < 0.95
    losses, _ = adversary.penalty_losses(random_images(), random_images(), torch.arange(6))
    expected = (masks * w).square().flatten(1).sum(1).mean()
    torch.testing.assert_close(losses, {"r1": expected})


def test_on_features_a_linear_d_s_penalty_does_not_ask_the_guide(make):
    adversary = make(penalty_on="features", every=1, r1=2.0)
    adversary.network = Linear((24, 3, 3), (24, 3, 3))
    losses, _ = adversary.penalty_losses(random_images(), random_images(), torch.arange(6))
    # the mean of two heads: half of each
    expected = sum((w / 2).square().sum() for w in adversary.network.weights)
    torch.testing.assert_close(losses["r1"], expected)


def test_on_pixels_it_is_differentiated_through_the_guide(make, guide):
    adversary = make(augment=(), every=1, r1=2.0, r2=4.0)
    real, fake = random_images(3), random_images(3, seed=1)

    def square(images):
        """By autograd's plain first derivative, summed."""
        images = images.clone().requires_grad_()
        logits = logits_by_hand(adversary, guide, images)
        logits = sum(one.mean((1, 2)) for one in logits) / 2
        (gradient,) = torch.autograd.grad(logits.sum(), images)
        return gradient.square().flatten(1).sum(1).mean()

    losses, _ = adversary.penalty_losses(real, fake, torch.arange(3))
    torch.testing.assert_close(losses["r1"], square(real), rtol=1e-4, atol=0)
    torch.testing.assert_close(losses["r2"], 2 * square(fake), rtol=1e-4, atol=0)
    # its gradient with respect to D, along one direction, by differences; LeakyReLU has jumps
    for module in adversary.network.modules():
        for name, child in list(module.named_children()):
            if isinstance(child, nn.LeakyReLU):
                setattr(module, name, nn.Softplus())
    losses, _ = adversary.penalty_losses(real, fake, torch.arange(3))
    sum(losses.values()).backward()
    parameters = list(adversary.network.parameters())
    steps = [0.1 * torch.randn_like(p) for p in parameters]
    slope = sum((p.grad * s).sum() for p, s in zip(parameters, steps, strict=True)).item()
    values = []
    for move in (0.05, -0.1):
        with torch.no_grad():
            for p, s in zip(parameters, steps, strict=True):
                p.add_(move * s)
        values.append((square(real) + 2 * square(fake)).item())
    assert abs(slope) > 0.1 * values[0]
    assert slope == pytest.approx((values[0] - values[1]) / 0.1, rel=0.02)


def test_penalties_are_lazy_or_a_part_of_d_s_own_loss(make):
    real, fake, positions = random_images(), random_images(seed=1), torch.arange(6)
    plain, lazy, each = make(), make(every=16, r1=2.0), make(every=1, r1=2.0)
    assert [adversary.lazy for adversary in (plain, lazy, each)] == [False, True, False]
    assert [adversary.optimizer_scale for adversary in (plain, lazy, each)] == [1, 16 / 17, 1]
    found = [adversary.d_losses(real, fake, positions)[0] for adversary in (plain, lazy, each)]
    assert [list(losses) for losses in found] == [["hinge"], ["hinge"], ["hinge", "r1"]]
    penalty, _ = lazy.penalty_losses(real, fake, positions)
    torch.testing.assert_close(penalty["r1"], 16 * found[2]["r1"])
