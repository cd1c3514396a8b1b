"""Imports what ranks take long to import, in the process that they are forked from."""

from dinogen._torchvision import ensure_torchvision

ensure_torchvision()

import torch.utils.tensorboard  # noqa: E402, F401
import transformers.models.dinov2.modeling_dinov2  # noqa: E402, F401
from transformers.conversion_mapping import get_checkpoint_conversion_mapping  # noqa: E402

import dinogen.evaluation.evaluate  # noqa: E402
import dinogen.features.dinov2  # noqa: E402
import dinogen.training.run  # noqa: E402, F401
import launch.cli.main  # noqa: E402, F401

get_checkpoint_conversion_mapping("dinov2")  # built once, and from_pretrained asks for it
