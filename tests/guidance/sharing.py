"""Objectives of all kinds over features that several ranks share, and their gradients."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from dinogen.batch import Batch, Features
from dinogen.distributed import process_group
from dinogen.guidance.objectives import (
    Directions,
    DistributionObjective,
    Drift,
    Energy,
    Mmd,
    SlicedWasserstein,
)
from dinogen.guidance.weighted import GlobalBatchObjective
from shards.read.order import share_of

BATCH, REFERENCE, START = 7, 9, 40
# (locations, channels) by level: not a multiple of the ranks, and fewer than ranks.
LEVELS = {"p2": (4, 3), "p3": (9, 2), "pixels.p1": (1, 3)}


class Own(DistributionObjective):
    """As a user may have written it: it knows nothing of coordinates."""

    def compare_sets(  # type: ignore[override]
        self, generated: Tensor, real: Tensor, directions: Directions
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Squared difference of the means of all pairs' squared distances."""
        apart, floor = (torch.cdist(a, real).square().mean((1, 2)) for a in (generated, real))
        return (apart - floor).square().mean(), {"apart": apart.mean()}


OBJECTIVES: dict[str, DistributionObjective] = {
    "energy": Energy(weight=0.5),
    "mmd": Mmd(bandwidths=(0.5, 1.0)),
    "sliced_wasserstein": SlicedWasserstein(num_slices=3),
    "drift": Drift(views=("location", "global"), widths=(0.2, 0.5)),
    "own": Own(weight=0.01),
}


def samples(num: int, seed: int) -> Features:
    """Random features of some samples."""
    rng = torch.Generator().manual_seed(seed)
    return {level: torch.randn(num, *shape, generator=rng) for level, shape in LEVELS.items()}


def batch_of(real: Features, first: int, conditions: Tensor) -> Batch:
    """Stored features as shards hold them, and what samples are conditioned on."""
    num = len(real["p2"])
    return {
        "key": [str(i) for i in range(num)],
        "position": torch.arange(num) + first,
        "pyramid": {2: real["p2"], 3: real["p3"]},
        "guides": {"pixels": {1: real["pixels.p1"]}},
        "clip": conditions,
    }


def rows(features: Features, chosen: slice) -> Features:
    """Some samples."""
    return {level: values[chosen] for level, values in features.items()}


def write_gradients(out: Path, has_reference: bool, num_parts: int, conditioned: bool) -> None:
    """Gradients of this rank's samples and its losses, times its share of the batch, to a file.

    Args:
        out: a folder.
        has_reference: whether generated samples are compared with a reference batch.
        num_parts: number of microbatches; with several, gradients are cached.
        conditioned: whether joint distributions with conditions are compared.
    """
    process_group.init()
    rank, world_size = process_group.rank(), process_group.world_size()
    rng = torch.Generator().manual_seed(5)
    ours, theirs = (torch.randn(num, 5, generator=rng) for num in (BATCH, REFERENCE))
    generated, real, reference = samples(BATCH, 0), samples(BATCH, 1), samples(REFERENCE, 2)
    share, more = (share_of(num, rank, world_size) for num in (BATCH, REFERENCE))
    leaves = {
        level: values.clone().requires_grad_() for level, values in rows(generated, share).items()
    }
    whole = GlobalBatchObjective(
        OBJECTIVES,
        {level: torch.linspace(0.5, 1.5, width) for level, (_, width) in LEVELS.items()},
        3,
        BATCH,
        lambda micro: rows(leaves, micro["chosen"]),  # type: ignore[typeddict-item]
        (lambda micro: micro["clip"]) if conditioned else None,
        REFERENCE if has_reference else 0,
        START,
    )
    num = share.stop - share.start
    micros = []
    for part in range(num_parts):
        first, end = num * part // num_parts, num * (part + 1) // num_parts
        kept = slice(first, end) if end > first else slice(num - 1, num)
        here = slice(share.start + kept.start, share.start + kept.stop)
        micro = batch_of(rows(real, here), START + BATCH + here.start, ours[here])
        if has_reference:
            micro["reference_batch"] = batch_of(rows(reference, more), 0, theirs[more])
        micro["chosen"] = kept  # type: ignore[typeddict-unknown-key]
        micros.append((micro, end - first))
    with torch.no_grad():
        whole.before(micros)
    values: dict[str, Tensor] = {}
    for micro, weight in micros:
        losses, report = whole.losses(micro, rows(leaves, micro["chosen"]))
        (sum(losses.values()) * (weight / BATCH)).backward()
        for name, value in (losses | report).items():
            values[name] = values.get(name, 0) + value.detach() * (weight / BATCH)
    gradients = {level: leaf.grad for level, leaf in leaves.items()}
    torch.save((gradients, values), out / f"{rank}.pt")
