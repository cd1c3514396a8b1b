"""Memory for batches, used again as soon as nobody holds them."""

from __future__ import annotations

import weakref
from collections import deque
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

_FREE_KEPT = 4


class Buffers:
    """Memory for batches, used again as soon as nobody holds the tensors made from it.

    Fresh memory costs a page fault per 4 KiB, which takes as long as reading into it.
    """

    def __init__(self, pinned: bool) -> None:
        self._pinned = pinned
        self._free: dict[tuple[tuple[int, ...], np.dtype[Any]], deque[npt.NDArray[Any]]] = {}

    def take(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> torch.Tensor:
        """An uninitialised tensor; its `.numpy()` shares the memory."""
        if self._pinned:
            # torch's own allocator of pinned memory waits for copies that are still under way.
            kind = getattr(torch, dtype.name)
            return torch.empty(shape, dtype=kind, pin_memory=True)
        free = self._free.setdefault((shape, dtype), deque(maxlen=_FREE_KEPT))
        try:
            buffer = free.pop()
        except IndexError:
            buffer = np.empty(shape, dtype)
        # The tensor's storage keeps `view` alive, and all tensors made from it share the storage.
        view = buffer[:]
        weakref.finalize(view, free.append, buffer).atexit = False
        return torch.from_numpy(view)
