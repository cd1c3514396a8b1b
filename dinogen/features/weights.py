"""The identity of a network's weights: one hash over names, dtypes and bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor


def weights_sha256(tensors: Mapping[str, Tensor]) -> str:
    """Hash over the sorted tensors: names, dtypes, shapes and bytes.

    Args:
        tensors: a state dict, on any device.

    Returns:
        64 hex digits, independent of the mapping's order and of the device.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}\0{tensor.dtype}\0{list(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
