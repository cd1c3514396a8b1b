"""Losses over embeddings against loops over their formulas."""

from __future__ import annotations

import math

import pytest
import torch

from dinogen.losses.clip import clip_loss, contrastive_loss, pseudo_text


def embeddings(num, size, seed):
    return torch.randn(num, size, generator=torch.Generator().manual_seed(seed))


def cosine(a, b):
    return (a @ b / (a.norm() * b.norm())).item()


def test_clip_loss_is_the_mean_of_one_minus_the_cosine():
    a, b = embeddings(6, 9, 0), 3 * embeddings(6, 9, 1)
    expected = sum(1 - cosine(x, y) for x, y in zip(a, b, strict=True)) / 6
    assert clip_loss(a, b).item() == pytest.approx(expected, rel=1e-5)
    assert clip_loss(a, 5 * a).item() == pytest.approx(0, abs=1e-6)
    assert clip_loss(a, -a).item() == pytest.approx(2, abs=1e-6)
    assert clip_loss(a.half(), b.half()).dtype == torch.float32


@pytest.mark.parametrize("xi", [0.1, 1.0, 3.0])
def test_pseudo_text_is_as_far_away_as_its_formula_says(xi):
    h, eps = 4 * embeddings(8, 32, 0), embeddings(8, 32, 1)
    found = pseudo_text(h, eps, xi)
    assert found.norm(dim=1).tolist() == pytest.approx([1.0] * 8, rel=1e-5)
    for one, noise, moved in zip(h, eps, found, strict=True):
        by_hand = one + xi * one.norm() * noise / noise.norm()
        torch.testing.assert_close(moved, by_hand / by_hand.norm())
        c = cosine(one, noise)
        expected = (1 + xi * c) / math.sqrt(1 + 2 * xi * c + xi**2)
        assert cosine(one, moved) == pytest.approx(expected, rel=1e-4)
    torch.testing.assert_close(found, pseudo_text(h, 100 * eps, xi))  # only its direction counts


def test_without_noise_the_embedding_stays():
    h = embeddings(3, 5, 0)
    torch.testing.assert_close(pseudo_text(h, h[[1, 2, 0]], 0), h / h.norm(dim=1, keepdim=True))


@pytest.mark.parametrize("tau", [0.07, 0.5])
def test_contrastive_loss_is_lafite_s_formula(tau):
    x, h = 2 * embeddings(5, 7, 0), embeddings(5, 7, 1)
    total = 0.0
    for i in range(5):
        likeness = [math.exp(cosine(x[j], h[i]) / tau) for j in range(5)]
        total -= tau * math.log(likeness[i] / sum(likeness))
    assert contrastive_loss(x, h, tau).item() == pytest.approx(total / 5, rel=1e-4)
    # each condition looks for its picture, not each picture for its condition
    assert contrastive_loss(h, x, tau).item() != pytest.approx(total / 5, rel=1e-3)


def test_contrastive_loss_at_its_ends():
    alike = embeddings(1, 7, 0).expand(4, 7)
    told = contrastive_loss(alike, embeddings(4, 7, 1), 0.5)
    assert told.item() == pytest.approx(0.5 * math.log(4), rel=1e-5)
    apart = torch.eye(4)
    assert contrastive_loss(apart, apart, 0.05).item() == pytest.approx(0, abs=1e-6)


def test_all_of_them_teach_the_pictures():
    x = embeddings(4, 6, 0).requires_grad_()
    for loss in (clip_loss(x, embeddings(4, 6, 1)), contrastive_loss(x, embeddings(4, 6, 1), 0.1)):
        (gradient,) = torch.autograd.grad(loss, x)
        moved = x.detach() - 0.1 * gradient
        assert clip_loss(moved, embeddings(4, 6, 1)) < clip_loss(x, embeddings(4, 6, 1))
