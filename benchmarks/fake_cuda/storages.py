"""What is known of storages for as long as they live: their size, or that they are pinned."""

from __future__ import annotations

import weakref
from collections.abc import Callable

from torch import Tensor


class Storages:
    """A set of the storages of tensors, which leave it when they are freed.

    Args:
        freed: called with the key of a storage that has left.
    """

    def __init__(self, freed: Callable[[int], None] = lambda key: None) -> None:
        self._freed = freed
        self._known: dict[int, weakref.ref[object]] = {}

    def add(self, tensor: Tensor) -> int | None:
        """The key of the tensor's storage, if it was not known yet."""
        storage = tensor.untyped_storage()
        key: int = storage._cdata
        if key in self._known:
            return None

        def gone(_: object) -> None:
            del self._known[key]
            self._freed(key)

        # A storage is the same object in Python for as long as it lives.
        self._known[key] = weakref.ref(storage, gone)
        return key

    def __contains__(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._known


PINNED = Storages()
