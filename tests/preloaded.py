"""Imports what most processes of tests take seconds to import, in the one they are forked from."""

from __future__ import annotations

import importlib
from contextlib import suppress

from dinogen._torchvision import ensure_torchvision

ensure_torchvision()

import matplotlib.pyplot  # noqa: E402, F401
import torch._dynamo  # noqa: E402
import torch.distributed.run  # noqa: E402
import torch.utils.tensorboard  # noqa: E402, F401
import transformers.models.dinov2.modeling_dinov2  # noqa: E402, F401
from transformers.conversion_mapping import get_checkpoint_conversion_mapping  # noqa: E402

import launch.study.state  # noqa: E402, F401
from dinogen.families.registry import family_names  # noqa: E402

for name in family_names():
    importlib.import_module(f"dinogen.families.{name}")
get_checkpoint_conversion_mapping("dinov2")  # built once, and from_pretrained asks for it
with suppress(ModuleNotFoundError):  # an extra; the second is what ZeRO imports at its first use
    import deepspeed
    import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
