"""Derived draws: the same in any batch, another for another purpose, of the right distribution."""

import numpy as np
import pytest
import torch
from scipy import stats

from dinogen.distributed import rng


def test_a_position_has_its_noise_whatever_batch_it_is_in():
    whole = rng.normal(7, "z", torch.arange(100), (8,))
    parts = [rng.normal(7, "z", torch.arange(i, 100, 3), (8,)) for i in range(3)]
    for i, part in enumerate(parts):
        assert torch.equal(whole[i::3], part)


def test_seed_purpose_and_position_all_matter():
    positions = torch.tensor([5, 2**40, 2**62])
    first = rng.normal(0, "z", positions, (64,))
    others = [
        rng.normal(1, "z", positions, (64,)),
        rng.normal(0, "y", positions, (64,)),
        rng.normal(0, "z", positions + 1, (64,)),
    ]
    for other in others:
        assert abs(np.corrcoef(first.flatten(), other.flatten())[0, 1]) < 0.3
    assert abs(np.corrcoef(first[0], first[1])[0, 1]) < 0.5


def test_it_is_standard_normal():
    noise = rng.normal(3, "z", torch.arange(2000), (4, 8))
    assert noise.shape == (2000, 4, 8)
    assert noise.dtype == torch.float32
    assert abs(noise.mean()) < 0.01
    assert abs(noise.std() - 1) < 0.01


# Known answers of Random123, the reference library of Philox's authors (kat_vectors).
ZEROS = ("00000000 00000000 00000000 00000000", "00000000 00000000")
ONES = ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff")
PI = ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0")


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        (*ZEROS, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        (*ONES, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (*PI, "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_philox_gives_the_known_answers(counter, key, answer):
    words = tuple(torch.tensor([int(word, 16)]) for word in counter.split())
    first, second = (int(word, 16) for word in key.split())
    assert [f"{int(word):08x}" for word in rng.philox(words, (first, second))] == answer.split()


@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 5)])
def test_uniform_and_integers(shape):
    positions = torch.arange(4000) + 2**35
    values = rng.uniform(3, "u", positions, shape)
    assert values.shape == (4000, *shape)
    assert values.min() > 0
    assert values.max() < 1
    assert stats.kstest(values.flatten().numpy(), "uniform").pvalue > 1e-3
    counts = rng.integers(3, "i", positions, shape, high=7).flatten().bincount(minlength=7)
    assert len(counts) == 7
    assert stats.chisquare(counts.numpy()).pvalue > 1e-3


def test_normal_is_normal_in_its_tails_too():
    noise = rng.normal(0, "z", torch.arange(50), (20_000,)).flatten()
    assert torch.isfinite(noise).all()
    assert stats.kstest(noise[::10].numpy(), "norm").pvalue > 1e-3
    assert 4.5 < noise.abs().max() < 6.8
    pairs = noise.reshape(-1, 4)
    assert (torch.corrcoef(pairs.T) - torch.eye(4)).abs().max() < 0.01
    squares = torch.corrcoef(pairs.square().T) - torch.eye(4)
    assert squares.abs().max() < 0.01


def test_torch_seed_leaves_the_callers_generator_alone():
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    with rng.torch_seed(5, "init"):
        inside = torch.rand(3)
    assert torch.equal(torch.rand(3), expected)
    with rng.torch_seed(5, "init"):
        assert torch.equal(torch.rand(3), inside)
