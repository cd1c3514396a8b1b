"""What a rank computes and holds for each distribution loss, on 1, 2, 4 and 8 ranks.

    python benchmarks/distributions.py [--generated 256] [--real 512] [--ranks 1 2 4 8]

Sizes are those of configs/guided_energy_64.yaml. Tensors have shapes and no numbers, so it takes
seconds and the memory of none of them. A rank's collectives return tensors of the right shape.

FLOP are those of matrix products, ``sorted`` is the number of values that are sorted, and the peak
counts everything that lives at once, a rank's own features and what it exchanges included. Only the
random directions of the sliced Wasserstein distance are not counted, which every rank draws whole.
"""

from __future__ import annotations

import argparse
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from dinogen.batch import Batch, Features
from dinogen.distributed.process_group import Ranks
from dinogen.guidance.objectives import (
    Directions,
    DistributionObjective,
    Drift,
    Energy,
    Mmd,
    SlicedWasserstein,
)
from dinogen.guidance.sets import View
from dinogen.guidance.weighted import GlobalBatchObjective
from shards.read.order import share_sizes

OBJECTIVES: dict[str, type[DistributionObjective]] = {
    "energy": Energy,
    "mmd": Mmd,
    "sliced_wasserstein": SlicedWasserstein,
    "drift": Drift,
}
# (locations, channels) by level.
LEVELS = {"p16": (256, 384), "p8": (64, 384), "p4": (16, 384), "pixels.p8": (64, 3)}


@dataclass(frozen=True)
class Cost:
    """What one rank computes and holds in one step of one objective.

    Attributes:
        flops: of matrix products.
        num_sorted: values that are sorted.
        peak: bytes that live at once.
    """

    flops: int
    num_sorted: int
    peak: int


class OneOfRanks(Ranks):
    """One rank, whose collectives return tensors of the right shape and no other rank's numbers."""

    def __init__(self, rank: int, num: int) -> None:
        self.rank, self.num = rank, num

    def sum(self, tensor: Tensor) -> Tensor:
        """The tensor itself."""
        return tensor

    def _exchange(self, numbers: Tensor, sent: list[int], received: list[int]) -> Tensor:
        assert sum(sent) == numbers.numel()
        return numbers.new_empty(sum(received))


class Tracker(TorchDispatchMode):
    """Counts sorted values, and the bytes of tensors that live at once.

    Attributes:
        num_sorted: so far.
        live: bytes now.
        peak: most bytes so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.num_sorted = self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket == torch.ops.aten.sort:
            self.num_sorted += args[0].numel()
        for one in tree_leaves(out):
            if isinstance(one, Tensor):
                self.track(one)
        return out

    def track(self, tensor: Tensor) -> None:
        """Count a tensor's storage until it is freed."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, key, size)

    def leave_out(self, tensor: Tensor) -> None:
        """Do not count a tensor, which has to outlive this."""
        self._known.add(tensor.untyped_storage()._cdata)

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


class _Given(GlobalBatchObjective):
    """Directions are there before anything is counted."""

    drawn: dict[tuple[int, int], Tensor]

    def directions(self, micros: Sequence[Batch], device: torch.device) -> Directions:
        return lambda size, number: self.drawn[size, number]


def cost(
    objective: DistributionObjective,
    num_ranks: int,
    num_generated: int = 256,
    num_real: int = 512,
    rank: int = 0,
) -> Cost:
    """What one of several ranks computes and holds for its part of a loss and its gradient.

    Args:
        objective: with any views.
        num_ranks: W.
        num_generated: samples of all ranks.
        num_real: samples of the reference batches of all ranks.
        rank: whose cost it is; rank 0 has the largest share.
    """
    num, num_slices = share_sizes(num_generated, num_ranks)[rank], 128
    with FakeTensorMode():
        scales = {level: torch.empty(width) for level, (_, width) in LEVELS.items()}
        whole = _Given(
            {"loss": objective}, scales, 0, num_generated, _no_features, reference_batch=num_real
        )
        whole.ranks = OneOfRanks(rank, num_ranks)
        sizes = {size for places, width in LEVELS.values() for size in (width, places * width)}
        whole.drawn = {(size, num_slices): torch.empty(size, num_slices) for size in sizes}
        real = _features(share_sizes(num_real, num_ranks)[rank])
        batch: Batch = {"key": [""] * num}
        batch["reference_batch"] = {
            "pyramid": {16: real["p16"], 8: real["p8"], 4: real["p4"]},
            "guides": {"pixels": {8: real["pixels.p8"]}},
        }
        generated = {level: values.requires_grad_() for level, values in _features(num).items()}
        with FlopCounterMode(display=False) as flops, Tracker() as tracker:
            for values in whole.drawn.values():
                tracker.leave_out(values)
            for values in (*generated.values(), *real.values()):
                tracker.track(values)
            losses, _ = whole.losses(batch, generated)
            torch.autograd.grad(sum(losses.values()), list(generated.values()))
    return Cost(flops.get_total_flops(), tracker.num_sorted, tracker.peak)


def _features(num: int) -> Features:
    return {level: torch.empty(num, *shape) for level, shape in LEVELS.items()}


def _no_features(batch: Batch) -> Features:
    raise AssertionError("features are given")


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--generated", type=int, default=256)
    parser.add_argument("--real", type=int, default=512)
    parser.add_argument("--ranks", type=int, nargs="*", default=[1, 2, 4, 8])
    options = parser.parse_args()
    print(f"{'objective':32} {'W':>3} {'TFLOP':>8} {'x W':>6} {'peak MB':>9} {'x W':>6} sorted x W")
    views: tuple[View, ...] = ("location", "global")
    for name, kind in OBJECTIVES.items():
        for chosen in ((view,) for view in views):
            one = cost(kind(views=chosen), 1, options.generated, options.real)
            for num in options.ranks:
                found = cost(kind(views=chosen), num, options.generated, options.real)
                share = f"{num * found.num_sorted / one.num_sorted:.2f}" if one.num_sorted else ""
                print(
                    f"{name + ' ' + chosen[0]:32} {num:3} {found.flops / 1e12:8.4f} "
                    f"{num * found.flops / one.flops:6.2f} {found.peak / 2**20:9.1f} "
                    f"{num * found.peak / one.peak:6.2f} {share}"
                )


if __name__ == "__main__":
    main()
