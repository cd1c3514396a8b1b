"""Losses over embeddings against loops over their formulas."""

from __future__ import annotations

import math

import pytest
import torch

from dinogen.losses.features import clip_loss, pseudo_text


def embeddings(num, size, seed):
    return torch.randn(num, size, generator=torch.Generator().manual_seed(seed))


def cosine(a, b):
    return (a @ b / (a.norm() * b.norm())).item()


def test_clip_loss_is_the_mean_of_one_minus_the_cosine():
    a, b, all_of_them = embeddings(6, 9, 0), 3 * embeddings(6, 9, 1), torch.ones(6).bool()
    apart = [1 - cosine(x, y) for x, y in zip(a, b, strict=True)]
    assert clip_loss(a, b, all_of_them).item() == pytest.approx(sum(apart) / 6, rel=1e-5)
    some = torch.tensor([1, 0, 0, 1, 1, 0]).bool()
    asked = apart[0] + apart[3] + apart[4]
    assert clip_loss(a, b, some).item() == pytest.approx(asked / 6, rel=1e-5)
    assert clip_loss(a, 5 * a, all_of_them).item() == pytest.approx(0, abs=1e-6)
    assert clip_loss(a, -a, all_of_them).item() == pytest.approx(2, abs=1e-6)
    assert clip_loss(a.half(), b.half(), all_of_them).dtype == torch.float32


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


def test_it_teaches_the_images():
    x, asked, keep = embeddings(4, 6, 0).requires_grad_(), embeddings(4, 6, 1), torch.ones(4).bool()
    (gradient,) = torch.autograd.grad(clip_loss(x, asked, keep), x)
    assert clip_loss(x.detach() - 0.1 * gradient, asked, keep) < clip_loss(x, asked, keep)
