"""The mean cosine of REPA, and its gradient, against what they are by hand."""

from __future__ import annotations

import math

import pytest
import torch

from dinogen.losses.features import alignment


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_it_is_the_mean_of_the_cosines():
    tokens, features = drawn(2, 9, 5), drawn(2, 9, 5, seed=1)
    cosines = [
        sum(a * b for a, b in zip(t, f, strict=True)) / math.hypot(*t) / math.hypot(*f)
        for t, f in zip(tokens.flatten(0, 1).tolist(), features.flatten(0, 1).tolist(), strict=True)
    ]
    assert float(alignment(tokens, features)) == pytest.approx(sum(cosines) / 18, abs=1e-6)


def test_only_directions_count():
    tokens = drawn(2, 9, 5)
    assert float(alignment(tokens, 3 * tokens)) == pytest.approx(1, abs=1e-6)
    assert float(alignment(tokens, -tokens / 7)) == pytest.approx(-1, abs=1e-6)
    assert float(alignment(tokens, torch.zeros_like(tokens))) == 0


def test_the_gradient_is_that_by_hand():
    """d cos / dt = (f / |f| - cos t / |t|) / |t|, over the number of tokens."""
    tokens, features = drawn(2, 9, 5).requires_grad_(), drawn(2, 9, 5, seed=1).half()
    alignment(tokens, features).backward()
    t, f = tokens.detach().double(), features.double()
    unit_t, unit_f = t / t.norm(dim=-1, keepdim=True), f / f.norm(dim=-1, keepdim=True)
    cos = (unit_t * unit_f).sum(-1, keepdim=True)
    expected = (unit_f - cos * unit_t) / t.norm(dim=-1, keepdim=True) / 18
    torch.testing.assert_close(tokens.grad.double(), expected, atol=1e-8, rtol=1e-5)
    # it turns a token and does not lengthen it
    assert (tokens.grad * tokens.detach()).sum(-1).abs().max() < 1e-7


def test_the_gradient_is_that_of_finite_differences():
    tokens, features = drawn(1, 4, 3).requires_grad_(), drawn(1, 4, 3, seed=1)
    alignment(tokens, features).backward()
    step = 1e-2
    for place in [(0, n, c) for n in range(4) for c in range(3)]:
        up, down = tokens.detach().clone(), tokens.detach().clone()
        up[place] += step
        down[place] -= step
        slope = (alignment(up, features) - alignment(down, features)) / (2 * step)
        assert float(slope) == pytest.approx(float(tokens.grad[place]), abs=2e-4)


def test_features_take_no_gradient():
    tokens, features = drawn(1, 4, 3).requires_grad_(), drawn(1, 4, 3, seed=1).requires_grad_()
    alignment(tokens, features).backward()
    assert features.grad is None
