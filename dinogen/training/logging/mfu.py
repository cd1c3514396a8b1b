"""Model FLOPs utilisation: which share of a GPU's peak arithmetic the training uses."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from dinogen.families.base import Phase
from dinogen.training.logging.peaks import peak_flops


class Mfu:
    """FLOPs of the steps since the last line over what the GPU could have computed meanwhile.

    FLOPs are those of matrix products, convolutions and attention, forward and backward, as this
    rank computes them. They are counted while a step runs, once for each set of phases that a step
    consists of, on a GPU whose peak is known and without ``engine.compile``, whose code hides
    them: elsewhere nothing is counted or reported. Counting changes no number: the
    same kernels run in the same order.

    Args:
        phases: of the family; each step runs those that are due.
        device: of this rank.
        precision: "fp32", "bf16" or "fp16", as resolved.
        compiled: whether networks are compiled.
    """

    def __init__(
        self, phases: Sequence[Phase], device: torch.device, precision: str, compiled: bool
    ) -> None:
        self.phases = phases
        self.peak: float | None = None
        if device.type == "cuda" and not compiled:
            tf32 = torch.backends.cuda.matmul.allow_tf32
            self.peak = peak_flops(torch.cuda.get_device_name(device), precision, tf32)
        self._flops: dict[tuple[str, ...], int] = {}
        self._ran: Counter[tuple[str, ...]] = Counter()

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around the optimizer step of this number."""
        if self.peak is None:
            yield
            return
        due = tuple(phase.name for phase in self.phases if phase.due(number))
        if due in self._flops:
            yield
        else:
            with FlopCounter() as counter:
                yield
            self._flops[due] = counter.flops
        self._ran[due] += 1

    def since_last_line(self, seconds: float) -> dict[str, float]:
        """{"mfu": share of the peak, 0 to 1} over the steps since the last call, or nothing."""
        if self.peak is None:
            return {}
        flops = sum(self._flops[due] * count for due, count in self._ran.items())
        self._ran.clear()
        return {"mfu": flops / (seconds * self.peak)}


class FlopCounter(TorchDispatchMode):
    """Counts FLOPs of products, convolutions and attention by torch's own formulas.

    Unlike ``torch.utils.flop_counter.FlopCounterMode`` it puts no hooks on modules and tensors.

    Attributes:
        flops: so far; a multiplication and an addition count as two.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run the kernel, and add what it computes."""
        result = func(*args, **(kwargs or {}))
        formula: Callable[..., int] | None = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=result)
        return result
