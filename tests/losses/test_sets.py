"""Objectives between sets of features, against loops, closed forms and scipy."""

import math

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist
from scipy.stats import energy_distance, wasserstein_distance

from dinogen.losses.distributions import (
    distances,
    drift,
    energy,
    energy_floor,
    mean_of_pairs,
    mmd,
    mmd_floor,
    moments,
    sliced_wasserstein,
)


def sets(num_problems=3, num_generated=7, num_real=9, size=5, shift=0.5):
    rng = np.random.default_rng(0)
    generated = rng.normal(size=(num_problems, num_generated, size)) + shift
    real = rng.normal(size=(num_problems, num_real, size))
    return torch.from_numpy(generated), torch.from_numpy(real)


def pairs(a, b):
    """Distances per square root of the dimension, by scipy."""
    return cdist(a.numpy(), b.numpy()) / math.sqrt(a.shape[1])


def apart(values):
    """Mean without the diagonal, by a loop."""
    num = len(values)
    return np.mean([values[i, j] for i in range(num) for j in range(num) if i != j])


def test_distances_are_scipys_also_far_from_the_origin():
    generated, real = sets()
    want = np.stack([pairs(a, b) for a, b in zip(generated, real, strict=True)])
    torch.testing.assert_close(distances(generated, real), torch.from_numpy(want))
    far = distances(generated.float() + 1000, real.float() + 1000)
    torch.testing.assert_close(far.double(), torch.from_numpy(want), atol=1e-3, rtol=1e-3)


def test_equal_samples_have_no_gradient_and_no_nan():
    same = torch.zeros(1, 3, 2, requires_grad=True)
    energy(same, torch.zeros(1, 2, 2)).backward()
    assert torch.equal(same.grad, torch.zeros_like(same))


def test_energy_is_that_of_the_loops():
    generated, real = sets()
    want = [
        2 * pairs(a, b).mean() - apart(pairs(a, a)) for a, b in zip(generated, real, strict=True)
    ]
    assert float(energy(generated, real)) == pytest.approx(np.mean(want), rel=1e-9)
    floor = [apart(pairs(b, b)) for b in real]
    assert float(energy_floor(real)) == pytest.approx(np.mean(floor), rel=1e-9)


def test_energy_of_many_samples_is_scipys_energy_distance():
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=3000), rng.normal(0.7, 1.5, size=3000)
    ours = energy(torch.from_numpy(a)[None, :, None], torch.from_numpy(b)[None, :, None])
    floor = energy_floor(torch.from_numpy(b)[None, :, None])
    assert float(ours - floor) == pytest.approx(energy_distance(a, b) ** 2, rel=0.02)


def test_energy_has_no_bias():
    """Of two draws from one distribution, small ones too, it is the floor on average."""
    torch.manual_seed(0)
    generated, real = (torch.randn(20_000, 3, 4, dtype=torch.float64) for _ in range(2))
    assert float(energy(generated, real)) == pytest.approx(float(energy_floor(real)), abs=0.01)


def test_mmd_is_that_of_the_loops():
    generated, real = sets()
    widths = (0.3, 1.0)

    def kernel(a, b):
        return np.mean([np.exp(-(pairs(a, b) ** 2) / (2 * w**2)) for w in widths], axis=0)

    want = [
        apart(kernel(a, a)) - 2 * kernel(a, b).mean() for a, b in zip(generated, real, strict=True)
    ]
    assert float(mmd(generated, real, widths)) == pytest.approx(np.mean(want), rel=1e-9)
    floor = [-apart(kernel(b, b)) for b in real]
    assert float(mmd_floor(real, widths)) == pytest.approx(np.mean(floor), rel=1e-9)


def test_mmd_of_gaussians_has_its_closed_form():
    """E k(x, y) = sqrt(s2 / (s2 + 2)) exp(-m2 / (2 (s2 + 2))) for unit normals a mean m apart."""
    torch.manual_seed(0)
    mean, width = 1.3, 0.8
    generated = torch.randn(1, 3000, 1, dtype=torch.float64) + mean
    real = torch.randn(1, 3000, 1, dtype=torch.float64)

    def expected(m):
        return math.sqrt(width**2 / (width**2 + 2)) * math.exp(-(m**2) / (2 * (width**2 + 2)))

    want = expected(0) - 2 * expected(mean)
    assert float(mmd(generated, real, (width,))) == pytest.approx(want, abs=0.02)


def test_moments_are_numpys():
    generated, real = sets()
    a, b = generated.numpy(), real.numpy()
    want = (a.mean(1) - b.mean(1)) ** 2 + (a.std(1, ddof=1) - b.std(1, ddof=1)) ** 2
    assert float(moments(generated, real)) == pytest.approx(want.mean(), rel=1e-6)


def test_sliced_wasserstein_along_axes():
    generated, real = sets(num_generated=8, num_real=8, size=3)
    axes = 2.5 * torch.eye(3, dtype=torch.float64)
    want = np.mean(
        [
            np.mean((np.sort(a[:, d]) - np.sort(b[:, d])) ** 2)
            for a, b in zip(generated.numpy(), real.numpy(), strict=True)
            for d in range(3)
        ]
    )
    assert float(sliced_wasserstein(generated, real, axes)) == pytest.approx(want, rel=1e-9)


def test_sliced_wasserstein_of_sets_that_differ_in_size():
    """A shift by c is c squared, however many reals; scipy's W1 of a shift is c."""
    rng = np.random.default_rng(2)
    real = rng.normal(size=4000)
    generated = np.quantile(real, (np.arange(500) + 0.5) / 500) + 0.6
    assert wasserstein_distance(real, generated) == pytest.approx(0.6, rel=0.01)
    found = sliced_wasserstein(
        torch.from_numpy(generated)[None, :, None],
        torch.from_numpy(real)[None, :, None],
        torch.ones(1, 1, dtype=torch.float64),
    )
    assert float(found) == pytest.approx(0.36, rel=0.01)


def drift_by_loops(x, y, width):
    """The field, one number at a time."""
    num, num_real = len(x), len(y)
    both = np.concatenate([y, x])
    kernel = np.zeros((num, num_real + num))
    for i in range(num):
        for j in range(num_real + num):
            own = j == num_real + i
            kernel[i, j] = 0 if own else np.exp(-np.linalg.norm(x[i] - both[j]) / width)
    weights = np.sqrt(kernel / kernel.sum(1, keepdims=True) * kernel / kernel.sum(0, keepdims=True))
    field = np.zeros_like(x)
    for i in range(num):
        pulls, pushes = weights[i, :num_real], weights[i, num_real:]
        for j in range(num_real):
            field[i] += pulls[j] * pushes.sum() * y[j]
        for j in range(num):
            field[i] -= pushes[j] * pulls.sum() * x[j]
    return field


def test_drift_carries_samples_where_the_paper_says():
    generated, real = sets(num_problems=2)
    generated.requires_grad_()
    widths = (0.2, 0.7)
    loss, length = drift(generated, real, widths)
    loss.backward()
    want, lengths, steps = 0.0, [], []
    for x, y in zip(generated.detach().numpy(), real.numpy(), strict=True):
        root = math.sqrt(x.shape[1])
        to_real, to_own = cdist(x, y) / root, cdist(x, x) / root
        num = len(x)
        scale = (to_real.sum() + to_own.sum()) / (num * (len(y) + num - 1))
        step = np.zeros_like(x)
        for width in widths:
            # the loops know no division by the root of D: distances of x / root are those
            field = drift_by_loops(x / scale / root, y / scale / root, width) * root
            size = np.sqrt((field**2).mean())
            lengths.append(size)
            step += field / size
        want += (step**2).mean() / 2
        steps.append(-2 * step / scale / step.size / 2)
    assert float(loss.detach()) == pytest.approx(want, rel=1e-6)
    assert float(length) == pytest.approx(np.mean(lengths), rel=1e-6)
    torch.testing.assert_close(generated.grad, torch.from_numpy(np.stack(steps)))


def test_drift_is_none_between_equal_sets_and_points_from_one_to_the_other():
    torch.manual_seed(0)
    real = torch.randn(1, 400, 2)
    here = drift(torch.randn(1, 400, 2), real, (0.2,))[1]
    away = drift(torch.randn(1, 400, 2) + 3, real, (0.2,))[1]
    assert float(here) < 0.3 * float(away)


def naive_distances(a, b):
    """(K, N, M) of all differences, safe to differentiate where samples are the same."""
    squares = (a[:, :, None] - b[:, None]).square().mean(3)
    same = squares == 0
    return squares.masked_fill(same, 1).sqrt().masked_fill(same, 0)


def naive_energy(generated, real):
    return 2 * naive_distances(generated, real).mean() - mean_of_pairs(
        naive_distances(generated, generated)
    )


def naive_mmd(generated, real):
    def kernel(a, b):
        squares = naive_distances(a, b).square()
        return sum(torch.exp(-squares / (2 * width**2)) for width in (0.3, 1.0)) / 2

    own = mean_of_pairs(kernel(generated, generated))
    return own - 2 * kernel(generated, real).mean()


def naive_moments(generated, real):
    means = (generated.mean(1) - real.mean(1)).square().mean()
    deviations = [(side.var(1) + 1e-8).sqrt() for side in (generated, real)]
    return means + (deviations[0] - deviations[1]).square().mean()


AXES = torch.eye(5, dtype=torch.float64)


def naive_sliced(generated, real):
    return (generated.sort(1).values - real.sort(1).values).square().mean()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("loss", "naive", "num_real"),
    [
        (energy, naive_energy, 9),
        (lambda a, b: mmd(a, b, (0.3, 1.0)), naive_mmd, 9),
        (moments, naive_moments, 9),
        (lambda a, b: sliced_wasserstein(a, b, 3 * AXES.to(a.dtype)), naive_sliced, 7),
    ],
    ids=["energy", "mmd", "moments", "sliced_wasserstein"],
)
def test_gradients_are_those_of_autograd(loss, naive, num_real, dtype):
    generated, real = sets(num_real=num_real)
    with torch.no_grad():  # equal samples in one set, and in both
        generated[0, 1] = generated[0, 0]
        generated[1, 2] = real[1, 3]
    leaf = generated.clone().requires_grad_()
    value = naive(leaf, real)
    (want,) = torch.autograd.grad(2 * value, leaf)
    ours = generated.to(dtype).requires_grad_()
    found = loss(ours, real.to(dtype))
    (2 * found).backward()
    # the distance of equal samples is at least 1e-6, and rounding of float32 moves them apart
    tolerance = {"rtol": 1e-7, "atol": 1e-6} if dtype == torch.float64 else {"rtol": 1, "atol": 0.1}
    torch.testing.assert_close(ours.grad.double(), want, **tolerance)
    apart = ~((generated[:, :, None] == torch.cat([generated, real], 1)[:, None]).all(3).sum(2) > 1)
    tight = {"rtol": 1e-7, "atol": 1e-9} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(ours.grad.double()[apart], want[apart], **tight)
    assert float(found.detach()) == pytest.approx(float(value.detach()), rel=1e-3)
    with torch.no_grad():
        assert not loss(generated, real).requires_grad


def test_distances_have_a_gradient_for_objectives_of_ones_own():
    generated, real = sets()
    leaf = generated.clone().requires_grad_()
    (found,) = torch.autograd.grad(distances(leaf, real).mean(), leaf)
    (want,) = torch.autograd.grad(naive_distances(leaf, real).mean(), leaf)
    torch.testing.assert_close(found, want)


def test_pairs_leave_out_the_diagonal():
    values = torch.tensor([[[100.0, 1.0], [3.0, 100.0]]])
    assert float(mean_of_pairs(values)) == 2.0
