"""Runs operators on CUDA tensors without values, and counts launches, waits, copies and FLOPs.

Tensors of the host are real, and so is what is done with them. What a GPU is modelled to need for
an operator is the longest of its FLOPs at the peak rate, its bytes at the bandwidth, and a launch.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry
from train_steps.counts import LAUNCH, Counts, Gpu
from train_steps.lines import Lines

from fake_cuda.shapes import READING, RESULTS
from fake_cuda.storages import PINNED, Storages
from fake_cuda.streams import Clock

HALF = (torch.float16, torch.bfloat16)
BLOCK = 512  # bytes; torch's allocator hands out multiples of it
# Operators that launch nothing. Views are found by their schema.
FREE = {
    "aten::alias",
    "aten::detach",
    "aten::empty",
    "aten::empty_like",
    "aten::empty_strided",
    "aten::expand",
    "aten::lift_fresh",
    "aten::new_empty",
    "aten::new_empty_strided",
    "aten::_reshape_alias",
    "aten::resize_",
    "aten::set_",
    "aten::_unsafe_view",
    "aten::view",
}
# Operators that read values, but for the shapes of their results.
CHECKING = {"aten::_linalg_check_errors"}
FOREACH, FUSED = 50, 30  # tensors that one launch takes: of their many sizes, roughly


class Counting(TorchDispatchMode):
    """Counts by parts of a step; see :func:`fake_cuda`, which enters it.

    Attributes:
        parts: what was counted since :meth:`begin`, by the name of the part.
        live: bytes that CUDA tensors take now.

    Args:
        root: of the code whose lines are named.
        gpu: the one that is modelled.
        precision: of the step, ``fp32``, ``bf16`` or ``fp16``: at whose peak rate the FLOPs count.
        named: whether each launch is counted by its line too, which takes long.
    """

    def __init__(self, root: Path, gpu: Gpu, precision: str = "fp32", named: bool = False) -> None:
        super().__init__()
        self.gpu = gpu
        self.named = named
        self._lines = Lines(root)
        self.live = 0
        self._peak = gpu.tf32 if precision == "fp32" else gpu.half
        self.parts: dict[str, Counts] = {}
        self._sizes: dict[int, int] = {}
        self._alive = Storages(self._freed)
        self.begin("rest")

    def begin(self, part: str) -> None:
        """Forget what was counted; a new step begins, with ``part``."""
        Clock.step += 1
        self.parts = {}
        self.enter(part)

    def enter(self, part: str) -> str:
        """What runs from now on belongs to ``part``; returns the part before."""
        before = getattr(self, "part", part)
        self.part = part
        self.now = self.parts.setdefault(part, Counts())
        self.now.peak = max(self.now.peak, self.live)
        return before

    def waited(self, what: str, queued_now: bool) -> None:
        """The host waited for an event, of this step or of one before."""
        (self.now.syncs if queued_now else self.now.waits)[self._lines.here(what)] += 1

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, FakeTensor)]
        device = kwargs.get("device")
        to_cuda = device is not None and torch.device(device).type == "cuda"
        if not inputs and not to_cuda:
            return _on_host(func, args, kwargs)
        name = func._schema.name
        if name in ("aten::_local_scalar_dense", "aten::item"):
            self.now.syncs[self._lines.here("item")] += 1
            came_as: Tensor | None = getattr(args[0], "came_as", None)
            return _value(args[0]) if came_as is None else _on_host(func, (came_as,), {})
        if name == "aten::copy_" and not isinstance(args[0], FakeTensor):
            return self._to_host(*args[:2], args[2:3] == (True,) or kwargs.get("non_blocking"))
        if name == "aten::_to_copy" and inputs and device is not None and not to_cuda:
            dtype = kwargs.get("dtype") or args[0].dtype
            with unset_fake_temporarily():
                there = torch.empty(args[0].shape, dtype=dtype)
            if kwargs.get("non_blocking"):
                PINNED.add(there)  # torch allocates it so
            return self._to_host(there, args[0], kwargs.get("non_blocking"))
        if name == "aten::_to_copy" and not inputs:
            self._to_device(args[0], kwargs.get("non_blocking"))
        if name == "aten::copy_" and not isinstance(args[1], FakeTensor):
            self._to_device(args[1], args[2:3] == (True,) or kwargs.get("non_blocking"))
        if name in ("aten::index", "aten::index_put", "aten::index_put_"):
            args = (args[0], self._indices(args[1]), *args[2:])
        if (name in READING or name in CHECKING) and kwargs.get("output_size") is None:
            self.now.syncs[self._lines.here(name.partition("::")[2])] += 1
        known = READING.get(name) or RESULTS.get(name) or func
        out = known(*args, **kwargs)
        if name in ("aten::_to_copy", "aten::copy_"):
            _remember(out, args[1] if name == "aten::copy_" else args[0])
        out = tree_map_only(FakeTensor, _real_on_host, out)
        outputs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, FakeTensor)]
        if (inputs or outputs) and not _is_free(func):
            self._launched(func, args, kwargs, out, inputs + outputs)
        self._allocated(outputs)
        return out

    def _launched(
        self,
        func: OpOverload,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        out: Any,
        tensors: Sequence[Tensor],
    ) -> None:
        """Count an operator that launches kernels."""
        name = func._schema.name
        num = 1
        if name.startswith("aten::_foreach"):
            lists = (arg for arg in args if isinstance(arg, (list, tuple)))
            num = math.ceil(max(map(len, lists)) / FOREACH)
        elif name.startswith("aten::_fused_adam"):
            num = len(args[0]) // FUSED + 1
        formula = flop_registry.get(func._overloadpacket)
        flops = formula(*args, **kwargs, out_val=out) if formula else 0
        moved = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        now = self.now
        now.launches += num
        now.flops += flops
        now.moved += moved
        computing = flops / self._rate(name, tensors)
        now.seconds += max(computing, moved / self.gpu.bandwidth, LAUNCH * num)
        now.at_peak += flops / self._peak
        if self.named:
            now.launched[self._lines.here(name.partition("::")[2])] += num

    def _rate(self, name: str, tensors: Sequence[Tensor]) -> float:
        """FLOP/s of an operator at its peak."""
        dtype = next((t.dtype for t in tensors if t.is_floating_point()), torch.float32)
        if dtype in HALF:
            return self.gpu.half
        backend = torch.backends.cudnn.conv if "conv" in name else torch.backends.cuda.matmul
        return self.gpu.tf32 if backend.fp32_precision == "tf32" else self.gpu.fp32

    def _to_host(self, there: Tensor, here: Tensor, non_blocking: bool | None) -> Tensor:
        """A copy to the host, where some plausible value arrives."""
        if non_blocking and there in PINNED:
            self.now.copies[self._lines.here("to host")] += 1
        else:
            self.now.syncs[self._lines.here("copy to host")] += 1
        self.now.launches += 1
        with unset_fake_temporarily():
            came_as: Tensor | None = getattr(here, "came_as", None)
            return _fill(there) if came_as is None else there.copy_(came_as)

    def _to_device(self, here: Tensor, non_blocking: bool | None) -> None:
        """A copy to the device: only from contiguous pinned memory does nothing wait for it."""
        if non_blocking and here in PINNED and here.is_contiguous():
            self.now.copies[self._lines.here("to device")] += 1
        else:
            self.now.blocking[self._lines.here("pinned" if here in PINNED else "not pinned")] += 1

    def _indices(self, indices: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Masks as the positions where they hold, which here is everywhere."""
        found: list[Tensor | None] = []
        for index in indices:
            if index is not None and not isinstance(index, FakeTensor) and index.dim():
                self.now.blocking[self._lines.here("index on the host")] += 1
            if index is not None and index.dtype in (torch.bool, torch.uint8):
                self.now.syncs[self._lines.here("index by a mask")] += 1
                where = index.new_empty(index.numel(), dtype=torch.int64)
                found += [where] * index.dim()
            else:
                found.append(index)
        return found

    def _allocated(self, tensors: Sequence[Tensor]) -> None:
        for tensor in tensors:
            key = self._alive.add(tensor)
            if key is not None:
                size = math.ceil(tensor.untyped_storage().nbytes() / BLOCK) * BLOCK
                self._sizes[key] = size
                self.live += size
                self.now.peak = max(self.now.peak, self.live)

    def _freed(self, key: int) -> None:
        self.live -= self._sizes.pop(key)


@contextmanager
def fake_cuda(counting: Counting) -> Iterator[Counting]:
    """Context in which tensors on CUDA have no values, and what is done to them is counted."""
    Clock.waited = counting.waited
    with FakeTensorMode(allow_non_fake_inputs=True), counting:
        yield counting


@cache
def _is_free(func: OpOverload) -> bool:
    name = func._schema.name
    return func.is_view or name in FREE or name.startswith(("prim::", "profiler::"))


def _on_host(func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What the host computes is computed."""
    pinned = kwargs.pop("pin_memory", None)
    with unset_fake_temporarily():
        out = func(*args, **kwargs)
    if pinned:
        PINNED.add(out)
    return out


def _value(tensor: Tensor) -> Any:
    """What the host reads of a tensor without values."""
    if tensor.dtype == torch.bool:
        return True
    if not tensor.is_floating_point():
        return 1
    # The gradient scaler adds up how many gradients were infinite: none.
    return 0.0 if _called_by("_maybe_opt_step") else 0.5


def _remember(there: Tensor, here: Tensor) -> None:
    """Whole numbers on the device that came from the host: ranks agree on such, and read them."""
    if not isinstance(here, FakeTensor) and not here.is_floating_point():
        with unset_fake_temporarily():
            there.came_as = here.clone()


def _fill(there: Tensor) -> Tensor:
    """Put what the host reads into its memory: floats from 0.25 to 0.75, ones, or True."""
    if there.is_floating_point() and there.numel() > 1:
        return there.copy_(torch.linspace(0.25, 0.75, there.numel()).view(there.shape))
    return there.fill_(_value(there))


def _called_by(function: str) -> bool:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == function:
            return True
        frame = frame.f_back
    return False


def _real_on_host(tensor: FakeTensor) -> Tensor:
    """Tensors of the host are real, also where they are made like one of the device."""
    if tensor.device.type == "cuda":
        return tensor
    with unset_fake_temporarily():
        return _fill(torch.empty(tensor.shape, dtype=tensor.dtype))
