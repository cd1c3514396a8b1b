"""Adversarial losses against torch's own cross-entropy and against what the papers write."""

import math

import pytest
import torch
from torch.nn import functional as F

from dinogen.losses.adversarial import (
    bce_d,
    bce_g,
    hinge_d,
    hinge_g,
    relativistic_d,
    relativistic_g,
    wasserstein_d,
    wasserstein_g,
)

REAL = torch.tensor([-3.0, -0.5, 0.0, 0.7, 2.0, 9.0])
FAKE = torch.tensor([4.0, 1.0, 0.0, -0.2, -1.5, -8.0])
D_LOSSES = [bce_d, wasserstein_d, hinge_d, relativistic_d]
G_LOSSES = [bce_g, wasserstein_g, hinge_g]


def test_cross_entropy_is_torch_s_own():
    ones, zeros = torch.ones(6), torch.zeros(6)
    reference = F.binary_cross_entropy_with_logits
    torch.testing.assert_close(bce_d(REAL, FAKE), reference(REAL, ones) + reference(FAKE, zeros))
    torch.testing.assert_close(bce_g(FAKE), reference(FAKE, ones))


def test_wasserstein_is_a_difference_of_means():
    assert wasserstein_d(REAL, FAKE).item() == pytest.approx(sum(FAKE) / 6 - sum(REAL) / 6)
    assert wasserstein_g(FAKE).item() == pytest.approx(-sum(FAKE) / 6)


def test_hinge_is_nothing_beyond_the_margin():
    expected = sum(max(0, 1 - x) for x in REAL.tolist()) + sum(max(0, 1 + x) for x in FAKE.tolist())
    assert hinge_d(REAL, FAKE).item() == pytest.approx(expected / 6)
    assert hinge_d(torch.tensor([1.0, 5.0]), torch.tensor([-1.0, -7.0])).item() == 0
    assert hinge_g(FAKE).item() == pytest.approx(-sum(FAKE) / 6)


@pytest.mark.parametrize("loss", D_LOSSES)
def test_d_wants_real_above_fake(loss):
    real, fake = REAL.clone().requires_grad_(), FAKE.clone().requires_grad_()
    loss(real, fake).backward()
    assert (real.grad <= 0).all() and (real.grad < 0).any()
    assert (fake.grad >= 0).all() and (fake.grad > 0).any()


@pytest.mark.parametrize("loss", G_LOSSES)
def test_g_wants_fake_higher_even_where_d_is_sure(loss):
    fake = torch.tensor([-30.0, -5.0, 0.0], requires_grad=True)
    loss(fake).backward()
    assert (fake.grad < 0).all()
    # non-saturating: the surer D, the stronger the pull, up to 1 per sample
    assert fake.grad[0].item() == pytest.approx(-1 / 3)


@pytest.mark.parametrize("loss", [*D_LOSSES, *G_LOSSES])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_give_a_finite_float32(loss, dtype):
    logits = torch.tensor([-6e4, 6e4], dtype=dtype)
    value = loss(logits, logits) if loss in D_LOSSES else loss(logits)
    assert value.dtype == torch.float32 and math.isfinite(value)


@pytest.mark.parametrize("loss", [*D_LOSSES, *G_LOSSES])
def test_a_batch_is_the_mean_of_its_halves(loss):
    def of(part):
        return loss(REAL[part], FAKE[part]) if loss in D_LOSSES else loss(FAKE[part])

    halves = (of(slice(0, 3)) + of(slice(3, 6))) / 2
    torch.testing.assert_close(of(slice(0, 6)), halves)


def test_relativistic_is_cross_entropy_of_the_difference_of_each_pair():
    reference = F.binary_cross_entropy_with_logits
    ones, zeros = torch.ones(6), torch.zeros(6)
    torch.testing.assert_close(relativistic_d(REAL, FAKE), reference(REAL - FAKE, ones))
    torch.testing.assert_close(relativistic_g(REAL, FAKE), reference(REAL - FAKE, zeros))
    by_hand = [
        math.log1p(math.exp(f - r)) for r, f in zip(REAL.tolist(), FAKE.tolist(), strict=True)
    ]
    assert relativistic_d(REAL, FAKE).item() == pytest.approx(sum(by_hand) / 6, rel=1e-5)
    # pairs, not means: another order is another loss
    assert relativistic_d(REAL, FAKE.flip(0)).item() != pytest.approx(sum(by_hand) / 6, rel=1e-2)


def test_relativistic_knows_no_level_of_its_own():
    for loss in (relativistic_d, relativistic_g):
        torch.testing.assert_close(loss(REAL + 3, FAKE + 3), loss(REAL, FAKE))
    assert relativistic_d(REAL, REAL).item() == pytest.approx(math.log(2))
    assert relativistic_g(REAL, REAL).item() == pytest.approx(math.log(2))


def test_relativistic_g_wants_what_d_does_not_even_where_d_is_sure():
    fake = torch.tensor([-30.0, -5.0, 0.0], requires_grad=True)
    relativistic_g(torch.zeros(3), fake).backward()
    assert (fake.grad < 0).all()
    assert fake.grad[0].item() == pytest.approx(-1 / 3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_relativistic_of_half_precision_logits_is_a_finite_float32(dtype):
    low, high = torch.tensor([-6e4], dtype=dtype), torch.tensor([6e4], dtype=dtype)
    for loss in (relativistic_d, relativistic_g):
        for value in (loss(low, high), loss(high, low)):
            assert value.dtype == torch.float32 and math.isfinite(value)
