"""Makes torch believe that there is one CUDA device, for the rest of the process."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.nn import functional as F
from torch.optim import optimizer

from fake_cuda import streams
from fake_cuda.storages import PINNED

# Where a device has no kernel for these, torch composes them of smaller ones; a GPU has.
_WHOLE_ON_A_GPU = ("silu_backward", "mish_backward")
_library = torch.library.Library("aten", "IMPL")


def install() -> None:
    """Replace what asks for a GPU in ``torch.cuda`` and elsewhere; the guard has to be loaded."""
    _replace_queries()
    streams.install()
    _replace_methods()
    F.scaled_dot_product_attention = _attention
    for name in _WHOLE_ON_A_GPU:
        _library.impl(name, _never, "CUDA")
    torch.load = _load
    torch.utils.swap_tensors = _exchange
    # Adam takes many tensors at once where their types are known to it.
    optimizer._foreach_supported_types.append(FakeTensor)
    FakeTensorMode.avoid_device_init = property(lambda self: True)


def _never(*args: Any) -> Tensor:
    """A kernel that tensors without values do not get to."""
    raise AssertionError("there is no GPU")


def _replace_queries() -> None:
    """The functions of torch.cuda that ask the driver."""
    properties = SimpleNamespace(
        name="fake CUDA device",
        major=9,
        minor=0,
        total_memory=80 * 2**30,
        multi_processor_count=132,
        warp_size=32,
        gcnArchName="",
    )
    answers: dict[str, Any] = {
        "is_available": True,
        "is_initialized": False,
        "is_bf16_supported": True,
        "is_current_stream_capturing": False,
        "device_count": 1,
        "current_device": 0,
        "get_device_name": properties.name,
        "get_device_capability": (properties.major, properties.minor),
        "get_device_properties": properties,
        "get_rng_state": torch.zeros(16, dtype=torch.uint8),
        "mem_get_info": (properties.total_memory, properties.total_memory),
        "memory_allocated": 0,
        "memory_reserved": 0,
        "max_memory_allocated": 0,
        "max_memory_reserved": 0,
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *args, answer=answer, **more: answer)
    for name in (
        "init",
        "_lazy_init",
        "set_device",
        "empty_cache",
        "reset_peak_memory_stats",
        "manual_seed",
        "manual_seed_all",
        "set_rng_state",
    ):
        setattr(torch.cuda, name, lambda *args, **more: None)


def _replace_methods() -> None:
    """Pinned memory is ordinary memory whose storage is known to be pinned; a list is one copy."""

    def pin_memory(self: Tensor, device: Any = None) -> Tensor:
        if self.is_pinned():
            return self
        pinned = self.clone(memory_format=torch.contiguous_format)
        PINNED.add(pinned)
        return pinned

    def is_pinned(self: Tensor, device: Any = None) -> bool:
        return self in PINNED

    FakeTensor.tolist = lambda self: self.cpu().tolist()
    Tensor.pin_memory = pin_memory
    Tensor.is_pinned = is_pinned
    Tensor.record_stream = lambda self, stream: None


_load_as_it_is = torch.load


def _load(*args: Any, **more: Any) -> Any:
    """Values of files; torch would leave them out where tensors without values are in use."""
    with unset_fake_temporarily():
        return _load_as_it_is(*args, **more)


def _exchange(old: Tensor, new: Tensor) -> None:
    """What modules do to parameters that are moved: swapping refuses those that a mode knows."""
    old.data = new.data


_composite_attention = F.scaled_dot_product_attention


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attention by the kernel that a GPU would choose; torch chooses it where there is one.

    Flash for half precision, the memory-efficient kernel for float32, both only for rows that are
    contiguous and where ``sdpa_kernel`` allows them; else single operators.
    """
    backends = torch.backends.cuda
    fake = isinstance(query, FakeTensor) and query.device.type == "cuda"
    rows = all(tensor.stride(-1) == 1 for tensor in (query, key, value))
    if not fake or not rows or attn_mask is not None or enable_gqa:
        return _composite_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    if torch.is_autocast_enabled("cuda"):
        dtype = torch.get_autocast_dtype("cuda")
        query, key, value = (tensor.to(dtype) for tensor in (query, key, value))
    half = query.dtype in (torch.float16, torch.bfloat16)
    aten = torch.ops.aten
    if half and backends.flash_sdp_enabled() and query.shape[-1] <= 256:
        return aten._scaled_dot_product_flash_attention(
            query, key, value, dropout_p, is_causal, scale=scale
        )[0]
    if backends.mem_efficient_sdp_enabled():
        needs_sums = torch.is_grad_enabled() and query.requires_grad
        return aten._scaled_dot_product_efficient_attention(
            query, key, value, None, needs_sums, dropout_p, is_causal, scale=scale
        )[0]
    return _composite_attention(query, key, value, None, dropout_p, is_causal, scale=scale)
