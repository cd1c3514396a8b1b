"""Objectives over a global batch: cut into parts and ranks they train as one; floors; caching."""

from __future__ import annotations

import pytest
import torch

from dinogen.guidance import comparing
from dinogen.guidance.objectives import Drift, Energy, Mmd, SlicedWasserstein, titles
from dinogen.guidance.weighted import GlobalBatchObjective
from dinogen.training.checkpointing.checkpoint import newest_checkpoint
from tests.guidance.runs import OBJECTIVES, train_all
from tests.training.on_ranks import on_ranks

TERMS = {
    "energy": Energy(weight=0.5),
    "mmd": Mmd(guides=("pixels",)),
    "sliced_wasserstein": SlicedWasserstein(num_slices=3),
    "drift": Drift(views=("location", "global"), widths=(0.2,)),
}
SIZE = 6


def weights(out, name):
    found = newest_checkpoint(out / name / "16x16" / "checkpoints")
    assert found is not None
    return found.tensors("G")


@pytest.fixture(scope="module")
def whole(two_guides, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    train_all(two_guides, out, {"whole": []})
    return out


PARTS = {"parts": ["engine.micro_batch=3"]}
TWO = {"ddp": [], "deepspeed": ["engine.name=deepspeed", "engine.micro_batch=2"]}
THREE = {"parts": ["engine.micro_batch=1"]}


@pytest.mark.parametrize(
    ("num_ranks", "ways"), [(1, PARTS), (2, TWO), (3, THREE)], ids=["one", "two", "three"]
)
def test_parts_and_ranks_train_as_one(num_ranks, ways, whole, two_guides, tmp_path):
    if num_ranks == 1:
        train_all(two_guides, tmp_path, ways)
    else:
        on_ranks(num_ranks, train_all, two_guides, tmp_path, ways)
    for way in ways:
        for name in OBJECTIVES:
            want, found = weights(whole / "whole", name), weights(tmp_path / way, name)
            for key, value in want.items():
                torch.testing.assert_close(
                    found[key], value, rtol=1e-3, atol=2e-5, msg=f"{way} {name} {key}"
                )


def test_objectives_train_differently(whole):
    """So that the test above compares something."""
    dense = [weights(whole / "whole", name)["dense.weight"] for name in OBJECTIVES]
    for i, one in enumerate(dense):
        assert all((one - other).abs().max() > 1e-4 for other in dense[:i])


def set_up(batch=SIZE):
    """A generator of one linear layer, reals, and an objective of all terms."""
    rng = torch.Generator().manual_seed(0)
    real = {
        level: torch.randn(batch, places, 3, generator=rng) + 1
        for level, places in (("p2", 4), ("pixels.p1", 1))
    }
    z = torch.randn(batch, 5, generator=rng)
    weight = torch.randn(5, 15, generator=rng).requires_grad_()

    def features(micro):
        flat = (micro["z"] @ weight).tanh()
        return {"p2": flat[:, :12].reshape(-1, 4, 3), "pixels.p1": flat[:, 12:, None].mT}

    scales = {"p2": torch.tensor([1.0, 2.0, 0.5]), "pixels.p1": torch.ones(3)}
    objective = GlobalBatchObjective(TERMS, scales, 0, batch, features, start=40)
    micro = {
        "z": z,
        "key": [str(i) for i in range(batch)],
        "position": torch.arange(batch) + 40,
        "pyramid": {2: real["p2"]},
        "guides": {"pixels": {1: real["pixels.p1"]}},
    }
    return objective, features, weight, micro, real, scales


def cut(micro, first, end):
    return {
        "z": micro["z"][first:end],
        "key": micro["key"][first:end],
        "position": micro["position"][first:end],
        "pyramid": {2: micro["pyramid"][2][first:end]},
        "guides": {"pixels": {1: micro["guides"]["pixels"][1][first:end]}},
    }


def test_the_gradient_is_that_of_the_plain_sum():
    """Against autograd through all terms at once, with no leaf, block or cache in between."""
    objective, features, weight, micro, real, scales = set_up()
    made = features(micro)
    losses, report = objective.losses(micro, made)
    (found,) = torch.autograd.grad(sum(losses.values()), weight)

    def directions(size, number):
        seen.append((size, number))
        from dinogen.distributed import rng as draws

        return draws.normal(0, "slices", torch.tensor([40]), (size, number))[0]

    seen: list[tuple[int, int]] = []
    total, made = torch.zeros(()), features(micro)
    for term in TERMS.values():
        levels = ["p2", "pixels.p1"] if not term.guides else ["pixels.p1"]
        for level in levels:
            ours, theirs = made[level] * scales[level], real[level] * scales[level]
            for view in term.views:
                sets = (
                    [x.transpose(0, 1) for x in (ours, theirs)]
                    if view == "location"
                    else [x.reshape(1, SIZE, -1) for x in (ours, theirs)]
                )
                part = term.compare_sets(*sets, directions)[0]
                total = total + term.weight * part / (len(levels) * len(term.views))
    (want,) = torch.autograd.grad(total, weight)
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-6)
    assert float(sum(losses.values()).detach()) == pytest.approx(float(total.detach()), rel=1e-5)
    assert seen
    assert "energy.p2.location" in report


@pytest.mark.parametrize("sizes", [(3, 3), (1, 4, 1), (2, 0, 4)])
def test_the_cached_gradient_is_the_uncached_one(sizes):
    objective, features, weight, micro, *_ = set_up()
    (want,) = torch.autograd.grad(sum(objective.losses(micro, features(micro))[0].values()), weight)
    micros, first = [], 0
    for num in sizes:
        start = min(first, SIZE - 1)
        micros.append((cut(micro, start, start + max(num, 1)), num))
        first += num
    with torch.no_grad():
        objective.before(micros)
    found = torch.zeros_like(want)
    for one, num in micros:
        losses, _ = objective.losses(one, features(one))
        total = sum(losses.values()) * (num / SIZE)
        found += torch.autograd.grad(total, weight)[0]
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-6)


def test_places_are_compared_in_blocks_of_bounded_size(monkeypatch):
    objective, features, weight, micro, *_ = set_up()
    (want,) = torch.autograd.grad(sum(objective.losses(micro, features(micro))[0].values()), weight)
    monkeypatch.setattr("dinogen.guidance.comparing._MOST_PAIRS", 1)
    (found,) = torch.autograd.grad(
        sum(objective.losses(micro, features(micro))[0].values()), weight
    )
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("at_once", [3, 1])
def test_the_floor_is_what_reals_reach(at_once, monkeypatch):
    """With a generator that draws reals, the losses are the floors on average."""
    torch.manual_seed(0)
    scales = {"p2": torch.tensor([1.0, 2.0, 0.5])}
    terms = {"energy": Energy(), "mmd": Mmd(moments=0), "drift": Drift()}
    objective = GlobalBatchObjective(terms, scales, 0, 8, lambda batch: {})
    sets = [{"p2": torch.randn(700, 4, 3)} for _ in range(2)]
    found = objective.compare(*sets, lambda size, number: torch.randn(size, number))
    whole = objective.floors(sets[1])
    monkeypatch.setattr(comparing, "_MOST_PAIRS", at_once * 700**2)
    floors = objective.floors(sets[1])
    assert floors == pytest.approx(whole, rel=1e-5)
    assert set(floors) == {"energy", "mmd"}, "that of drift is not known"
    for name, floor in floors.items():
        assert float(found.losses[name]) == pytest.approx(floor, abs=0.02)


def test_titles_number_what_is_named_twice():
    assert titles((Energy(), Mmd(), Energy())) == ["energy", "mmd", "energy_2"]
