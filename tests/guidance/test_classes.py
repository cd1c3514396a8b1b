"""Batches by class: strengths of guidance, and ranks that share the comparison within classes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dinogen.batch import Batch, Features
from dinogen.distributed import process_group
from dinogen.guidance.classes import ClassBatches
from dinogen.guidance.objectives import Drift, Energy
from dinogen.guidance.options import GuidedOptions
from dinogen.guidance.weighted import GlobalBatchObjective
from shards.read.order import share_of
from tests.training.on_ranks import on_ranks

BATCH, REFERENCE, START = 8, 5, 40
# (locations, channels) by level; on 3 ranks no location is alike for all
LEVELS = {"p4": (16, 2), "p8": (64, 1)}
VIEWS = ("location", "global", "mean_std", "patches")


def options(**more):
    given = {"num_classes": 2, "samples_per_class": 2, "guidance_range": (1.0, 4.0)}
    return GuidedOptions(generator="dit", **given | more)


@pytest.mark.parametrize("power", [0.0, 1.0, 3.0])
def test_strengths_have_the_density_of_a_power(power):
    """The share below a is (a^(1-power) - 1) / (4^(1-power) - 1), or log(a) / log(4)."""
    classes = ClassBatches(options(guidance_power=power), 0, BATCH, 0)
    found = classes.guidance(torch.arange(0, 40_000, 2))
    assert found.min() >= 1 and found.max() <= 4
    for limit in (1.2, 2.0, 3.0):
        at = torch.tensor([limit, 4.0])
        below = at.log() if power == 1 else at ** (1 - power) - 1
        assert float((found < limit).float().mean()) == pytest.approx(
            float(below[0] / below[1]), abs=0.015
        )


def test_samples_of_a_group_have_the_strength_of_its_weight():
    classes = ClassBatches(options(), 3, BATCH, START)
    positions = torch.arange(START + 2 * BATCH, START + 3 * BATCH)
    strengths = classes.guidance(positions).view(4, 2)
    assert torch.equal(strengths[:, 0], strengths[:, 1])
    assert len(set(strengths[:, 0].tolist())) == 4
    groups = classes.groups(START + 2 * BATCH, {"p4": torch.zeros(3, 16, 2)}, torch.device("cpu"))
    torch.testing.assert_close(groups.weights, (strengths[:, 0] - 1) / 3)
    assert classes.groups(START, None, torch.device("cpu")).weights is None


def samples(num: int, seed: int) -> Features:
    rng = torch.Generator().manual_seed(seed)
    return {level: torch.randn(num, *shape, generator=rng) for level, shape in LEVELS.items()}


def batch_of(real: Features, first: int) -> Batch:
    num = len(real["p4"])
    return {
        "key": [str(i) for i in range(num)],
        "position": torch.arange(num) + first,
        "pyramid": {4: real["p4"], 8: real["p8"]},
    }


def write_gradients(out: Path, guided: bool, num_parts: int) -> None:
    """Gradients of this rank's samples and its losses, times its share of the batch, to a file."""
    process_group.init()
    rank, world_size = process_group.rank(), process_group.world_size()
    generated, real, reference = samples(BATCH, 0), samples(BATCH, 1), samples(REFERENCE, 2)
    mine, more = (share_of(num, rank, world_size) for num in (BATCH, REFERENCE))
    leaves = {level: v[mine].clone().requires_grad_() for level, v in generated.items()}
    objectives = {
        "together": Drift(views=VIEWS, widths=(0.2, 0.5), normalize="together"),
        "each": Drift(views=VIEWS, widths=(0.2, 0.5)),
    }
    whole = GlobalBatchObjective(
        objectives if guided else objectives | {"energy": Energy(views=VIEWS)},
        {level: torch.linspace(0.5, 1.5, width) for level, (_, width) in LEVELS.items()},
        3,
        BATCH,
        lambda micro: {k: v[micro["chosen"]] for k, v in leaves.items()},
        reference_batch=REFERENCE if guided else 0,
        start=START,
        classes=ClassBatches(options(), 3, BATCH, START),
    )
    num = mine.stop - mine.start
    micros = []
    for part in range(num_parts):
        chosen = slice(num * part // num_parts, num * (part + 1) // num_parts)
        here = slice(mine.start + chosen.start, mine.start + chosen.stop)
        micro = batch_of({k: v[here] for k, v in real.items()}, START + BATCH + here.start)
        if guided:
            micro["reference_batch"] = batch_of({k: v[more] for k, v in reference.items()}, 0)
        micro["chosen"] = chosen
        micros.append((micro, chosen.stop - chosen.start))
    with torch.no_grad():
        whole.before(micros)
    values = {}
    for micro, weight in micros:
        features = {k: v[micro["chosen"]] for k, v in leaves.items()}
        losses, report = whole.losses(micro, features)
        (sum(losses.values()) * (weight / BATCH)).backward()
        for name, value in (losses | report).items():
            values[name] = values.get(name, 0) + value.detach() * (weight / BATCH)
    torch.save(({k: v.grad for k, v in leaves.items()}, values), out / f"{rank}.pt")


def found(out: Path, num_ranks: int):
    ranks = [torch.load(out / f"{rank}.pt") for rank in range(num_ranks)]
    gradients = {level: torch.cat([rank[0][level] for rank in ranks]) for level in LEVELS}
    assert all(list(rank[1]) == list(ranks[0][1]) for rank in ranks), "or reducing them would hang"
    return gradients, {name: float(sum(rank[1][name] for rank in ranks)) for name in ranks[0][1]}


@pytest.mark.parametrize("guided", [False, True])
def test_ranks_find_what_one_finds(guided, tmp_path):
    write_gradients(tmp_path, guided, 1)
    want, values = found(tmp_path, 1)
    for num_ranks in (2, 3):
        out = tmp_path / str(num_ranks)
        out.mkdir()
        on_ranks(num_ranks, write_gradients, out, guided, 2)
        gradients, others = found(out, num_ranks)
        torch.testing.assert_close(gradients, want, rtol=1e-4, atol=1e-6)
        assert others == pytest.approx(values, rel=1e-4, abs=1e-6)
