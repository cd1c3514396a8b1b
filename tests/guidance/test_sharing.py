"""Ranks that share the work of a distribution loss get the gradient and the values of one rank."""

from __future__ import annotations

import importlib

import pytest
import torch

from dinogen.guidance.objectives import Drift, Energy, Mmd, SlicedWasserstein
from tests.guidance.sharing import LEVELS, write_gradients
from tests.training.benchmarks import FOLDER
from tests.training.on_ranks import on_ranks

NUM_RANKS = (2, 3, 4)


def found(out, num_ranks):
    """Gradients of all samples, and the values that the logger averages over ranks."""
    ranks = [torch.load(out / f"{rank}.pt") for rank in range(num_ranks)]
    gradients = {level: torch.cat([rank[0][level] for rank in ranks]) for level in LEVELS}
    assert all(list(rank[1]) == list(ranks[0][1]) for rank in ranks), "or reducing them would hang"
    values = {name: float(sum(rank[1][name] for rank in ranks)) for name in ranks[0][1]}
    return gradients, values


@pytest.mark.parametrize(
    ("has_reference", "num_parts", "conditioned"),
    [(False, 1, False), (True, 2, True)],
    ids=["batch", "reference, conditions and parts"],
)
def test_ranks_find_what_one_finds(has_reference, num_parts, conditioned, tmp_path):
    write_gradients(tmp_path, has_reference, 1, conditioned)
    want, values = found(tmp_path, 1)
    for num_ranks in NUM_RANKS:
        out = tmp_path / str(num_ranks)
        out.mkdir()
        on_ranks(num_ranks, write_gradients, out, has_reference, num_parts, conditioned)
        gradients, others = found(out, num_ranks)
        torch.testing.assert_close(gradients, want, rtol=1e-4, atol=1e-6)
        assert others == pytest.approx(values, rel=1e-4, abs=1e-6)


@pytest.fixture(scope="module")
def distributions():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        return importlib.import_module("distributions")


@pytest.mark.parametrize("view", ["location", "global"])
@pytest.mark.parametrize(
    "kind", [Energy, Mmd, SlicedWasserstein, Drift], ids=lambda kind: kind.__name__
)
def test_a_rank_computes_and_holds_its_share(kind, view, distributions):
    """Matrix products, sorted values and memory of the whole step of a loss."""
    whole = distributions.cost(kind(views=(view,)), 1)
    assert whole.flops > 0
    assert (whole.num_sorted > 0) == (kind is SlicedWasserstein)
    for num in (2, 4, 8):
        one = distributions.cost(kind(views=(view,)), num)
        assert num * one.flops == pytest.approx(whole.flops, rel=0.05)
        assert num * one.num_sorted == pytest.approx(whole.num_sorted, rel=0.05)
        assert num * one.peak == pytest.approx(whole.peak, rel=0.1)
