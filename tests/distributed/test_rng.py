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


def draw_all(positions, high=9):
    """As a step does: some draws, in any order, of all kinds."""
    return [
        rng.normal(1, "z", positions, (6,)),
        rng.integers(1, "cut", positions, (2,), high=high),
        rng.uniform(1, "mix", positions),
        rng.normal(1, "noise", positions, (3, 5)),
        rng.integers(2, "cut", positions, high=1000),
        rng.uniform(1, "table", positions, (19, 3)),
    ]


def test_draws_made_together_are_those_made_one_by_one(monkeypatch):
    alone = draw_all(torch.arange(8) + 2**34)
    together, batches = rng.Together(), [torch.arange(8) + 2**34, torch.arange(3)]
    num = []
    core = rng._philox
    monkeypatch.setattr(rng, "_philox", lambda *args: num.append(1) or core(*args))
    for expected in (12, 2, 2):
        num.clear()
        with together.step("kind", batches):
            first, second = draw_all(batches[0]), draw_all(batches[1])
        assert len(num) == expected
        for mine, his in zip(first, alone, strict=True):
            assert torch.equal(mine, his)
            assert mine.dtype == his.dtype
        for mine, his in zip(second, draw_all(torch.arange(3)), strict=True):
            assert torch.equal(mine, his)


def test_what_was_not_foreseen_is_drawn_by_itself():
    together, positions = rng.Together(), torch.arange(4)
    with together.step("kind", [positions]):
        draw_all(positions)
    with together.step("kind", [positions]):
        new = rng.normal(1, "another", positions, (6,))
        other_high = draw_all(positions, high=5)[1]
        half = rng.normal(1, "z", positions[::2], (6,))
    assert torch.equal(new, rng.normal(1, "another", positions, (6,)))
    assert torch.equal(other_high, rng.integers(1, "cut", positions, (2,), high=5))
    assert torch.equal(half, rng.normal(1, "z", torch.tensor([0, 2]), (6,)))


def test_large_draws_are_made_when_they_are_needed(monkeypatch):
    together, positions = rng.Together(), torch.arange(2)
    sizes = []
    core = rng._philox
    monkeypatch.setattr(
        rng, "_philox", lambda a, *rest: sizes.append(a.shape[-1]) or core(a, *rest)
    )
    for _ in range(2):
        sizes.clear()
        with together.step("kind", [positions]):
            rng.normal(1, "z", positions, (8,))
            large = rng.normal(1, "eps", positions, (2**16,))
    assert sizes == [2, 2**14]
    assert torch.equal(large, rng.normal(1, "eps", positions, (2**16,)))


def test_what_is_no_longer_drawn_is_no_longer_made(monkeypatch):
    together, positions = rng.Together(), torch.arange(2)
    monkeypatch.setattr(rng, "_FORGOTTEN_AFTER", 3)
    with together.step("kind", [positions]):
        rng.normal(1, "rare", positions, (4000,))
        rng.normal(1, "z", positions, (4,))
    sizes = []
    core = rng._philox
    monkeypatch.setattr(
        rng, "_philox", lambda a, *rest: sizes.append(a.shape[-1]) or core(a, *rest)
    )
    for _ in range(6):
        with together.step("kind", [positions]):
            rng.normal(1, "z", positions, (4,))
    assert sizes == [1001, 1001, 1001, 1, 1, 1]
