"""Drift within groups: against loops, and where samples come to rest."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from dinogen.guidance.comparing import DistributionObjective
from dinogen.guidance.objectives import Drift, Energy
from dinogen.guidance.sets import Groups, places_of, sets_of
from dinogen.losses.distributions import drift
from dinogen.losses.drifting import Negatives, grouped_drift, unconditional_weight

WIDTHS = (0.05, 0.2)


def sets(seed=0, num_problems=3, num=5, num_real=6, num_negatives=4, size=3):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(num_problems, num, size)) + 0.5
    y = (
        rng.normal(size=(num_problems, num_real, size))
        * (1 + np.arange(num_problems))[:, None, None]
    )
    u = rng.normal(size=(num_problems, num_negatives, size)) - 1
    return x, y, u


def field_by_loops(x, y, u, weight, width, scale):
    """One field of one problem, in features, with weighted negatives.

    ``scale`` is the mean distance; the kernel is normalised over both sets, and over the samples.
    """
    others = np.concatenate([y, u, x])
    weights = np.array([1.0] * len(y) + [weight] * len(u) + [1.0] * len(x))
    first_own = len(y) + len(u)
    kernel = np.zeros((len(x), len(others)))
    for i in range(len(x)):
        for j in range(len(others)):
            if j != first_own + i:
                distance = np.linalg.norm(x[i] - others[j])
                kernel[i, j] = math.exp(-distance / scale / width)
    both = np.zeros_like(kernel)
    for i in range(len(x)):
        for j in range(len(others)):
            both[i, j] = math.sqrt(
                kernel[i, j] / kernel[i].sum() * kernel[i, j] / kernel[:, j].sum()
            )
    both *= weights
    field = np.zeros_like(x)
    for i in range(len(x)):
        for a in range(len(y)):  # towards each real sample, away from each negative
            for b in range(len(y), len(others)):
                field[i] += both[i, a] * both[i, b] * (others[a] - others[b])
    return field


def drift_by_loops(x, y, u, weights, widths, together):
    """Loss and gradient: scaled features, each field to a mean square of 1."""
    num_problems, num, size = x.shape
    sums, counts = np.zeros(num_problems), np.zeros(num_problems)
    for k in range(num_problems):
        for i in range(num):
            others = [(s, 1.0) for s in y[k]] + [(s, weights[k]) for s in u[k]]
            others += [(s, 1.0) for j, s in enumerate(x[k]) if j != i]
            for other, weight in others:
                sums[k] += weight * np.linalg.norm(x[k, i] - other)
                counts[k] += weight
    scales = np.full(num_problems, sums.sum() / counts.sum()) if together else sums / counts
    step = np.zeros_like(x)
    unit = scales[:, None, None] / math.sqrt(size)  # features over this have mean distance sqrt(D)
    for width in widths:
        field = np.stack(
            [
                field_by_loops(x[k], y[k], u[k], weights[k], width, scales[k])
                for k in range(num_problems)
            ]
        )
        field = field / unit
        squares = (field**2).mean((1, 2), keepdims=True)
        step += field / np.sqrt(squares.mean(keepdims=True) if together else squares)
    return (step**2).mean(), -2 * step / step.size / unit


@pytest.mark.parametrize("together", [False, True])
def test_it_is_what_loops_find(together):
    x, y, u = sets()
    weights = np.array([0.0, 0.7, 2.5])
    want, gradient = drift_by_loops(x, y, u, weights, WIDTHS, together)
    generated = torch.from_numpy(x).requires_grad_()
    negatives = Negatives(torch.from_numpy(u), torch.from_numpy(weights))
    loss, _ = grouped_drift(generated, torch.from_numpy(y), WIDTHS, negatives, together)
    loss.backward()
    assert loss.item() == pytest.approx(want, rel=1e-9)
    np.testing.assert_allclose(generated.grad.numpy(), gradient, rtol=1e-6, atol=1e-12)


def test_without_negatives_it_is_drift():
    x, y, _ = (torch.from_numpy(s) for s in sets())
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    loss, length = grouped_drift(ours, y, WIDTHS)
    expected, expected_length = drift(theirs, y, WIDTHS)
    loss.backward()
    expected.backward()
    torch.testing.assert_close((loss, length), (expected, expected_length), rtol=1e-6, atol=0)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-9)


def test_blocks_of_problems_change_nothing(monkeypatch):
    x, y, u = (torch.from_numpy(s) for s in sets())
    negatives = Negatives(u, torch.tensor([0.3, 1.0, 2.0], dtype=torch.float64))
    found = []
    for most in (2**26, 1):
        monkeypatch.setattr("dinogen.losses.drifting._MOST_PAIRS", most)
        generated = x.clone().requires_grad_()
        loss, length = grouped_drift(generated, y, WIDTHS, negatives, together=True)
        loss.backward()
        found.append((loss, length, generated.grad))
    torch.testing.assert_close(*found)


def test_the_weight_gives_the_negatives_their_share():
    """alpha = 1 / (1 - gamma), gamma the share of unconditional samples among the negatives."""
    for alpha, num, num_negatives in ((1.0, 8, 4), (1.5, 8, 4), (4.0, 64, 16)):
        weight = float(unconditional_weight(torch.tensor(alpha), num, num_negatives))
        gamma = num_negatives * weight / (num - 1 + num_negatives * weight)
        assert 1 / (1 - gamma) == pytest.approx(alpha)


def pull_to_the_right(share, alpha, num=400):
    """Drift of samples at +1, of which there are ``share`` and the others at -1; alpha guides.

    The class has 3/4 of its samples at +1, all classes together half.
    """

    def at_both(right):
        return torch.tensor([1.0] * round(num * right) + [-1.0] * round(num * (1 - right)))[:, None]

    x = at_both(share)[None].double().requires_grad_()
    weight = unconditional_weight(torch.tensor([alpha]), num, num)
    negatives = Negatives(at_both(0.5)[None].double(), weight)
    loss, _ = grouped_drift(x, at_both(0.75)[None].double(), (0.5,), negatives)
    loss.backward()
    return -float(x.grad[0, 0])


@pytest.mark.parametrize("alpha", [1.0, 1.2, 1.6])
def test_guided_samples_come_to_rest_at_their_fixed_point(alpha):
    """q = alpha p(x | c) - (alpha - 1) p(x), to within a sample or two."""
    at_rest = 0.75 * alpha - 0.5 * (alpha - 1)
    assert pull_to_the_right(at_rest - 0.02, alpha) > 0
    assert pull_to_the_right(at_rest + 0.02, alpha) < 0


def mean_at_rest(alpha, num=200, steps=200):
    """Of samples of the class at +1 that were moved along their drift; the other one is at -1."""
    generator = torch.Generator().manual_seed(0)

    def normal(mean):
        return mean + torch.randn(1, num, 1, generator=generator, dtype=torch.float64)

    real, x = normal(1.0), normal(0.0)
    everything = torch.cat([real[:, ::2], normal(-1.0)[:, ::2]], 1)
    weight = unconditional_weight(torch.tensor([alpha]), num, num)
    for step in range(steps):
        x = x.detach().requires_grad_()
        loss, _ = grouped_drift(x, real, (0.5,), Negatives(everything, weight))
        loss.backward()
        x = x - 0.1 * (1 - step / steps) * x.grad * num
    return float(x.detach().mean())


def test_guidance_moves_samples_away_from_the_unconditional_ones():
    plain, guided = mean_at_rest(1.0), mean_at_rest(1.8)
    assert plain == pytest.approx(1.0, abs=0.2)
    assert guided > plain + 0.25


def features_of(num, seed, grid=4, channels=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num, grid * grid, channels, generator=generator, dtype=torch.float64)


def test_parts_of_the_grid_by_loops():
    features = features_of(2, 0, grid=8)
    maps = features.view(2, 8, 8, 3).numpy()
    found = places_of(features, "patches") | places_of(features, "mean_std")
    assert list(found) == ["mean_2", "std_2", "mean_4", "std_4", "mean", "std"]
    for size, suffix in ((2, "_2"), (4, "_4"), (8, "")):
        means, deviations = found[f"mean{suffix}"], found[f"std{suffix}"]
        side = 8 // size
        assert means.shape == deviations.shape == (2, side * side, 3)
        for row in range(side):
            for column in range(side):
                part = maps[:, size * row : size * (row + 1), size * column : size * (column + 1)]
                place = row * side + column
                np.testing.assert_allclose(means[:, place], part.mean((1, 2)))
                want = np.sqrt(part.var((1, 2)) + 1e-6)
                np.testing.assert_allclose(deviations[:, place], want)


def test_a_grid_without_patches_is_refused():
    assert sets_of("patches", 4) == ("mean_2", "std_2")
    for grid in (1, 2, 7):
        with pytest.raises(ValueError, match=f"grid of {grid}x{grid}"):
            sets_of("patches", grid)


def none(size, number):
    raise AssertionError("no directions")


@pytest.mark.parametrize("normalize", ["each", "together"])
@pytest.mark.parametrize("view", ["location", "global", "mean_std", "patches"])
def test_groups_are_compared_by_themselves(view, normalize):
    """As each class in a comparison of its own, or with scales that all share."""
    objective = Drift(views=(view,), widths=WIDTHS, normalize=normalize)
    generated, real, negatives = (features_of(num, num) for num in (6, 10, 4))
    weights = torch.tensor([0.5, 2.0], dtype=torch.float64)
    groups = Groups(2, {"p4": negatives}, weights)
    loss, gradients, _ = objective.loss_and_gradients(
        {"p4": generated}, {"p4": real}, none, groups=groups
    )
    leaf = generated.clone().requires_grad_()
    expected = []
    for name in sets_of(view, 4):
        ours, theirs, others = (places_of(s, view)[name] for s in (leaf, real, negatives))
        problems = [
            (ours[3 * g : 3 * g + 3, place], theirs[5 * g : 5 * g + 5, place], others[:, place])
            for g in range(2)
            for place in range(ours.shape[1])
        ]
        stacked = [torch.stack(list(side)) for side in zip(*problems, strict=True)]
        of_each = weights.repeat_interleave(ours.shape[1])
        together = normalize == "together"
        found, _ = grouped_drift(
            stacked[0], stacked[1], WIDTHS, Negatives(stacked[2], of_each), together
        )
        expected.append(found)
    want = torch.stack(expected).mean()
    want.backward()
    assert loss.item() == pytest.approx(want.item(), rel=1e-6)
    torch.testing.assert_close(gradients["p4"].double(), leaf.grad, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("view", ["location", "global", "mean_std", "patches"])
def test_other_objectives_take_the_mean_over_groups(view):
    objective = Energy(views=(view,))
    generated, real = features_of(6, 1), features_of(10, 2)
    loss, gradients, _ = objective.loss_and_gradients(
        {"p4": generated}, {"p4": real}, none, groups=Groups(2)
    )
    leaf = generated.clone().requires_grad_()
    alone: DistributionObjective = Energy(views=(view,))
    parts = [
        alone({"p4": leaf[3 * g : 3 * g + 3]}, {"p4": real[5 * g : 5 * g + 5]}) for g in range(2)
    ]
    want = torch.stack(parts).mean()
    want.backward()
    assert loss.item() == pytest.approx(want.item(), rel=1e-6)
    torch.testing.assert_close(gradients["p4"], leaf.grad, rtol=1e-5, atol=1e-10)
