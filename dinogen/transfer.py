"""Copies between host and device that neither of the two waits for.

A copy to a GPU is asynchronous only from pinned memory, and reading a number back waits until all
that was queued before it is done. Between two log lines a training step does neither: what the
device needs goes through :func:`to_device`, what the host needs of a step arrives by
:class:`Arrivals` while the next one is already queued.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor, nn

T = TypeVar("T")
_ALIGNED = 8  # bytes


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device; a copy from the host is queued, and nothing waits for it.

    torch's allocator of pinned memory keeps the host's side until the copy is done.
    """
    if device.type != "cuda" or tensor.device.type == "cuda":
        return tensor.to(device)
    if not tensor.is_pinned():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


@torch.no_grad()
def copy_all(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy each source to its target on the same device, those of one type in one operation."""
    by_type: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
    for target, source in zip(targets, sources, strict=True):
        mine, theirs = by_type.setdefault(target.dtype, ([], []))
        mine.append(target)
        theirs.append(source)
    for mine, theirs in by_type.values():
        torch._foreach_copy_(mine, theirs)


def to_device_together(
    tensors: Sequence[Tensor], device: torch.device, choice: Tensor | None = None
) -> list[Tensor]:
    """Small tensors of any types on the device, in one copy that nothing waits for.

    Args:
        tensors: on the host; with ``choice`` each is (K, ...) and one of the K reaches the caller.
        device: where they go.
        choice: () int64 on the device, 0 to K - 1.
    """
    if device.type != "cuda" or not tensors:
        return [one if choice is None else one[choice] for one in tensors]
    rows = [(one[None] if choice is None else one).contiguous() for one in tensors]
    moved = _joined(rows, pin_memory=True).to(device, non_blocking=True)
    return _parted(moved[0] if choice is None else moved.index_select(0, choice[None])[0], rows)


def _joined(rows: Sequence[Tensor], pin_memory: bool) -> Tensor:
    """(K, bytes) of contiguous tensors (K, ...)."""
    spans = _spans(rows)
    size = (len(rows[0]), spans[-1].stop)
    joined = torch.empty(size, dtype=torch.uint8, pin_memory=pin_memory)
    for row, span in zip(rows, spans, strict=True):
        num = row[0].numel()
        joined[:, span] = row.view(len(row), num).view(torch.uint8)
    return joined


def _parted(joined: Tensor, rows: Sequence[Tensor]) -> list[Tensor]:
    """A row of :func:`_joined` as the tensors that it was made of."""
    spans = zip(rows, _spans(rows), strict=True)
    return [joined[span].view(row.dtype).view(row.shape[1:]) for row, span in spans]


def _spans(rows: Sequence[Tensor]) -> list[slice]:
    """The bytes of each; they begin where any type may."""
    spans, end = [], 0
    for row in rows:
        start = -(-end // _ALIGNED) * _ALIGNED
        end = start + row[0].numel() * row.element_size()
        spans.append(slice(start, end))
    return spans


@dataclass
class _Sent(Generic[T]):
    """Numbers on their way to the host, and what they belong to."""

    note: T
    names: tuple[str, ...]
    numbers: Tensor
    event: Any = field(default=None)


class Arrivals(Generic[T]):
    """Numbers that the device computes and the host reads later, in the order they were sent.

    Args:
        device: where the numbers are computed.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._sent: deque[_Sent[T]] = deque()

    def __len__(self) -> int:
        return len(self._sent)

    def send(self, note: T, numbers: Mapping[str, Tensor]) -> None:
        """Queue the copy of scalars to the host.

        Args:
            note: what they belong to; :meth:`receive` returns it with them.
            numbers: scalars on the device; they arrive as float32.
        """
        joined = torch.stack([number.detach().float() for number in numbers.values()])
        sent = _Sent(note, tuple(numbers), joined)
        if self._device.type == "cuda":
            sent.numbers = torch.empty(joined.shape, dtype=joined.dtype, pin_memory=True)
            sent.numbers.copy_(joined, non_blocking=True)
            sent.event = torch.cuda.Event()
            sent.event.record()
        self._sent.append(sent)

    def receive(self) -> tuple[T, dict[str, float]]:
        """What was sent first of all that was not received yet; waits until it is here.

        Raises:
            IndexError: nothing is on its way.
        """
        sent = self._sent.popleft()
        if sent.event is not None:
            sent.event.synchronize()
        return sent.note, dict(zip(sent.names, sent.numbers.tolist(), strict=True))


class Buffers:
    """The buffers of networks as they are now, in their order; all have to be registered already.

    Their places are listed once: to walk through the modules takes longer than to copy them.
    """

    def __init__(self, networks: Iterable[nn.Module]) -> None:
        self._places = [
            (module._buffers, name)
            for network in networks
            for module in network.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]

    def now(self) -> list[Tensor]:
        """Each buffer; a module may have put another in its place since the last call."""
        return [cast(Tensor, buffers[name]) for buffers, name in self._places]


class Kept:
    """Buffers of networks, which a change can be taken back from without asking the device.

    Args:
        networks: by name.
    """

    def __init__(self, networks: Mapping[str, nn.Module]) -> None:
        self._buffers = Buffers(networks.values())
        self._before = [torch.empty_like(buffer) for buffer in self._buffers.now()]

    @contextmanager
    @torch.no_grad()
    def unless(self, kept: Tensor) -> Iterator[None]:
        """Context whose changes of buffers are undone at its end, if ``kept`` is False there.

        Args:
            kept: a bool scalar on the device.
        """
        buffers = self._buffers.now()
        versions = [buffer._version for buffer in buffers]
        copy_all(self._before, buffers)
        yield
        for now, then, version, before in zip(
            self._buffers.now(), buffers, versions, self._before, strict=True
        ):
            if now is not then or now._version != version:
                now.copy_(torch.where(kept, now, before))
