"""Derived noise: the same whatever the batch, another for another purpose, standard normal."""

import numpy as np
import torch

from dinogen import draws


def test_a_position_has_its_noise_whatever_batch_it_is_in():
    whole = draws.normal(7, "z", torch.arange(100), (8,))
    parts = [draws.normal(7, "z", torch.arange(i, 100, 3), (8,)) for i in range(3)]
    for i, part in enumerate(parts):
        assert torch.equal(whole[i::3], part)


def test_seed_purpose_and_position_all_matter():
    positions = torch.tensor([5, 2**40, 2**62])
    first = draws.normal(0, "z", positions, (64,))
    others = [
        draws.normal(1, "z", positions, (64,)),
        draws.normal(0, "y", positions, (64,)),
        draws.normal(0, "z", positions + 1, (64,)),
    ]
    for other in others:
        assert abs(np.corrcoef(first.flatten(), other.flatten())[0, 1]) < 0.3
    assert abs(np.corrcoef(first[0], first[1])[0, 1]) < 0.5


def test_it_is_standard_normal():
    noise = draws.normal(3, "z", torch.arange(2000), (4, 8))
    assert noise.shape == (2000, 4, 8)
    assert noise.dtype == torch.float32
    assert abs(noise.mean()) < 0.01
    assert abs(noise.std() - 1) < 0.01


def test_torch_seed_leaves_the_callers_generator_alone():
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    with draws.torch_seed(5, "init"):
        inside = torch.rand(3)
    assert torch.equal(torch.rand(3), expected)
    with draws.torch_seed(5, "init"):
        assert torch.equal(torch.rand(3), inside)
