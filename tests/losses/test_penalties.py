"""Gradient penalty and R1 where D's gradient is known, and their own gradients by differences."""

import pytest
import torch
from torch import nn

from dinogen.losses.adversarial import gradient_penalty, r1_penalty

SHAPE = (5, 3, 4, 4)
NUM = 3 * 4 * 4


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def eps(value=None):
    return torch.rand(5, 1, 1, 1) if value is None else torch.full((5, 1, 1, 1), value)


def test_of_a_linear_d_both_are_known_everywhere():
    a = torch.randn(NUM, requires_grad=True)
    norm = a.detach().norm()

    def D(x):
        return x.flatten(1) @ a

    real, fake = torch.randn(SHAPE), torch.randn(SHAPE)
    penalty = gradient_penalty(D, real, fake, eps())
    torch.testing.assert_close(penalty, (norm - 1).square())
    (gradient,) = torch.autograd.grad(penalty, a)
    torch.testing.assert_close(gradient, 2 * (norm - 1) * a.detach() / norm)

    r1 = r1_penalty(D, real)
    torch.testing.assert_close(r1, norm.square())
    (gradient,) = torch.autograd.grad(r1, a)
    torch.testing.assert_close(gradient, 2 * a.detach())


def test_of_a_quadratic_d_they_are_taken_at_the_right_places():
    A = torch.randn(NUM, NUM)
    A = (A + A.T) / 10

    def D(x):
        return 0.5 * (x.flatten(1) @ A * x.flatten(1)).sum(1)

    real, fake, mix = torch.randn(SHAPE), 3 * torch.randn(SHAPE), eps()
    between = (mix * real + (1 - mix) * fake).flatten(1)
    expected = ((between @ A).norm(dim=1) - 1).square().mean()
    torch.testing.assert_close(gradient_penalty(D, real, fake, mix), expected)
    at_real = ((real.flatten(1) @ A).norm(dim=1) - 1).square().mean()
    torch.testing.assert_close(gradient_penalty(D, real, fake, eps(1.0)), at_real)
    expected = (real.flatten(1) @ A).square().sum(1).mean()
    torch.testing.assert_close(r1_penalty(D, real), expected)


class Net(nn.Module):
    """A curved D in double precision, regardless of the images are."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.linear = nn.Linear(16, 1)
        self.double()

    def forward(self, x):
        y = nn.functional.softplus(3 * self.conv(x.double()))
        return self.linear(y.flatten(1)).flatten()


@pytest.mark.parametrize("kind", ["gradient_penalty", "r1"])
def test_gradient_for_d_s_parameters_is_that_of_differences(kind):
    D, real, fake, mix = Net(), torch.randn(SHAPE), torch.randn(SHAPE), eps()

    def penalty():
        if kind == "r1":
            return r1_penalty(D, real)
        return gradient_penalty(D, real, fake, mix)

    penalty().backward()
    step = 1e-3
    for parameter in D.parameters():
        for i in range(0, parameter.numel(), 7):
            flat = parameter.data.view(-1)
            kept = flat[i].item()
            flat[i] = kept + step
            above = penalty().item()
            flat[i] = kept - step
            below = penalty().item()
            flat[i] = kept
            slope = (above - below) / (2 * step)
            assert parameter.grad.view(-1)[i].item() == pytest.approx(slope, rel=2e-3, abs=5e-4)


def test_every_parameter_gets_a_gradient_though_a_last_bias_has_no_part_in_it():
    for kind in (lambda D: r1_penalty(D, torch.randn(SHAPE)), lambda D: both(D)):
        D = Net()
        kind(D).backward()
        assert [name for name, p in D.named_parameters() if p.grad is None] == []
        assert D.linear.bias.grad.item() == 0


def both(D):
    return gradient_penalty(D, torch.randn(SHAPE), torch.randn(SHAPE), eps())


def test_a_flat_d_gives_1_and_a_finite_gradient():
    a = torch.zeros(NUM, requires_grad=True)
    penalty = gradient_penalty(
        lambda x: x.flatten(1) @ a, torch.randn(SHAPE), torch.randn(SHAPE), eps()
    )
    assert penalty.item() == 1
    (gradient,) = torch.autograd.grad(penalty, a)
    assert torch.isfinite(gradient).all()


def test_autocast_changes_nothing():
    D = nn.Sequential(nn.Flatten(), nn.Linear(NUM, 20), nn.Softplus(), nn.Linear(20, 1))
    real, fake, mix = torch.randn(SHAPE), torch.randn(SHAPE), eps()
    expected = gradient_penalty(D, real, fake, mix), r1_penalty(D, real)
    with torch.autocast("cpu", torch.bfloat16):
        assert D(real).dtype == torch.bfloat16
        got = gradient_penalty(D, real, fake, mix), r1_penalty(D, real)
        halves = gradient_penalty(D, real, fake.bfloat16(), mix)
    assert got == expected
    assert halves.dtype == torch.float32


def test_the_images_are_left_as_they_were():
    real, fake = torch.randn(SHAPE), torch.randn(SHAPE, requires_grad=True)
    D = Net()
    (gradient_penalty(D, real, fake, eps()) + r1_penalty(D, real)).backward()
    assert not real.requires_grad and fake.grad is None


def test_a_batch_is_the_mean_of_its_parts():
    D, real, fake, mix = Net(), torch.randn(SHAPE), torch.randn(SHAPE), eps()
    parts = [(slice(0, 2), 2 / 5), (slice(2, 5), 3 / 5)]
    gp = sum(share * gradient_penalty(D, real[p], fake[p], mix[p]) for p, share in parts)
    torch.testing.assert_close(gp, gradient_penalty(D, real, fake, mix))
    r1 = sum(share * r1_penalty(D, real[p]) for p, share in parts)
    torch.testing.assert_close(r1, r1_penalty(D, real))


class Attending(nn.Module):
    """A D with attention over pixels, fused or written out."""

    def __init__(self, fused):
        super().__init__()
        torch.manual_seed(1)
        self.qkv, self.out, self.fused = nn.Linear(3, 48), nn.Linear(16, 1), fused

    def forward(self, x):
        q, k, v = self.qkv(x.flatten(2).transpose(1, 2))[:, None].chunk(3, -1)
        if self.fused:
            y = nn.functional.scaled_dot_product_attention(q, k, v)
        else:
            y = torch.softmax(q @ k.transpose(2, 3) / 4, -1) @ v
        return self.out(y.square()).mean((1, 2, 3))


def test_fused_attention_inside_d_is_differentiated_twice():
    real = torch.randn(SHAPE)
    found = {}
    for fused in (True, False):
        D = Attending(fused)
        penalty = r1_penalty(D, real)
        penalty.backward()
        found[fused] = [penalty.detach(), *(p.grad for p in D.parameters())]
    assert found[False][0] > 1e-4
    torch.testing.assert_close(found[True], found[False])
