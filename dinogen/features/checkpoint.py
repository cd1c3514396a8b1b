"""A network of transformers from a checkpoint folder: whole, in float32, or one clear error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dinogen.features.base import GuideError
from dinogen.features.hub import quiet_transformers
from dinogen.features.weights import weights_sha256


@contextmanager
def damage_told(key: str, path: str) -> Iterator[None]:
    """What transformers and safetensors raise on damaged files, as one GuideError.

    Args:
        key: of the config that names the checkpoint.
        path: as the user named it there.
    """
    try:
        yield
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()
        raise GuideError(
            f"{key}: {path} is damaged ({reason[0] if reason else repr(error)}): get the "
            "checkpoint again, whole"
        ) from error


def read_model(network: Any, folder: Path, config: Any, key: str, path: str) -> Any:
    """The network in float32, from safetensors alone; no weight is filled with noise.

    Args:
        network: class of transformers.
        folder: of the checkpoint.
        config: transformers' own, read from the folder.
        key: as in :func:`damage_told`.
        path: likewise.

    Raises:
        GuideError: weights are missing or of another shape than the config says.
    """
    with quiet_transformers():
        model, report = network.from_pretrained(
            folder,
            config=config,
            local_files_only=True,
            use_safetensors=True,
            dtype=torch.float32,
            attn_implementation="sdpa",
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # told below, in one line
        )
    if report["missing_keys"]:
        names = sorted(report["missing_keys"])
        raise GuideError(
            f"{key}: {path} lacks {len(names)} weights ({', '.join(names[:3])}, ...): get the "
            "checkpoint again, whole"
        )
    if report["mismatched_keys"]:
        name, stored, wanted = min(report["mismatched_keys"])
        raise GuideError(
            f"{key}: {path} is damaged ({name} is {list(stored)}, by config.json it is "
            f"{list(wanted)}): get the checkpoint again, whole"
        )
    return model


def hash_folder(folder: Path, pattern: str) -> str:
    """Hash of the weights as they lie on disk, whatever transformers renames them to."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob(pattern)):
        tensors.update(load_file(file))
    return weights_sha256(tensors)
