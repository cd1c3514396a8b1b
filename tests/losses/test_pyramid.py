"""The mse objective and its floor, against numpy and against what theory says of a mean."""

import numpy as np
import torch

from dinogen.losses.features import collapse_floor, mean_pairwise_distance, pyramid_mse


def test_mse_is_the_mean_over_levels_of_each_level_s_mean():
    rng = np.random.default_rng(0)
    shapes = {4: (3, 16, 5), 8: (3, 64, 5)}
    a = {g: rng.normal(size=s) for g, s in shapes.items()}
    b = {g: rng.normal(size=s) for g, s in shapes.items()}
    expected = np.mean([np.mean((a[g] - b[g]) ** 2) for g in shapes])
    got = pyramid_mse(
        {g: torch.from_numpy(v) for g, v in a.items()},
        {g: torch.from_numpy(v) for g, v in b.items()},
    )
    np.testing.assert_allclose(got.item(), expected, rtol=1e-6)


def test_samples_that_are_left_out_count_nothing_in_a_mean_over_all():
    generated = {4: torch.tensor([[[1.0, 3.0]], [[5.0, 5.0]]])}
    real = {4: torch.zeros(2, 1, 2)}
    assert pyramid_mse(generated, real, torch.tensor([True, False])) == (1 + 9) / 2 / 2


def test_a_generator_that_makes_the_mean_reaches_exactly_the_floor():
    rng = np.random.default_rng(1)
    real = rng.normal(size=(500, 16, 6)) * rng.uniform(0.1, 3, size=(16, 6))
    mean = torch.from_numpy(real.mean(0)).expand(500, 16, 6)
    loss = pyramid_mse({4: mean}, {4: torch.from_numpy(real)})
    floor = collapse_floor([real.var(axis=0).mean()])
    np.testing.assert_allclose(loss.item(), floor, rtol=1e-6)
    # and anything that varies independently of the target pays for its own variance
    noise = torch.from_numpy(rng.normal(size=(500, 16, 6)))
    loss = pyramid_mse({4: mean + noise}, {4: torch.from_numpy(real)})
    np.testing.assert_allclose(loss.item(), floor + 1, rtol=0.05)


def test_mean_pairwise_distance_by_hand():
    corners = torch.tensor([[[0.0, 0.0]], [[3.0, 4.0]], [[0.0, 4.0]]])
    assert mean_pairwise_distance(corners) == (5 + 4 + 3) / 3
