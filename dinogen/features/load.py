"""Finds a guide by the name of its file, or in a file of the user's own, and loads it."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import ModuleType

import torch
from pydantic import ValidationError

from dinogen.config import ConfigError, GuideConfig
from dinogen.config.base import describe_errors
from dinogen.config.guides import default_path
from dinogen.features.base import Guide
from dinogen.files import module_of_file

_PARTS = ("DEFAULT_PATH", "load", "layer_channels")


def load_guide(
    guide: GuideConfig | str,
    device: torch.device | str = "cpu",
    *,
    path: Path | str | None = None,
    layer: int | str | Sequence[int] | Sequence[str] | None = None,
    revision: str | None = None,
) -> Guide:
    """Load a frozen feature network onto a device.

    ```python
    dinogen.load_guide("dinov2", "cuda", path="facebook/dinov2-small", layer=[6, 12])
    dinogen.load_guide("dinov2", path="hf://user/name@revision")
    dinogen.load_guide("pixels")
    ```

    A new guide is one file, ``dinogen/features/NAME.py`` or one that ``guide.file`` names. It has
    ``DEFAULT_PATH``, a literal that is the ``guide.path`` of configs that give none (None if it
    reads no weights), ``load(config, device) -> Guide``, and
    ``layer_channels(config) -> tuple[int, ...]``, the channels of each layer of the config.

    Args:
        guide: ``dinov2``, ``dinov3``, ``siglip``, ``vit``, ``timm``, ``inception``, ``onet`` or
            ``pixels``; or the section ``guide`` of a config, which says everything else but the
            device.
        device: where it will run.
        path: hub name, address of the hub, checkpoint folder or weights file; default: the
            guide's own.
        layer: which layer, or several whose channels are concatenated; default: the last. They are
            block numbers of transformers, ``pool1``, ``pool2``, ``mixed_5d`` and ``mixed_6e`` of
            ``inception``, and ``conv1``, ``conv2``, ``conv3``, ``pool3`` and ``conv4`` of ``onet``.
        revision: hub commit, tag or branch.

    Raises:
        ConfigError: no guide has this name, ``layer`` is none, or ``guide.file`` defines no guide.
        GuideError: its weights are not available, or are not what they should be; the message
            names ``guide.path`` and the remedy.
    """
    given = {"path": path if path is None else str(path), "layer": layer, "revision": revision}
    given = {key: value for key, value in given.items() if value is not None}
    if isinstance(guide, str):
        try:
            guide = GuideConfig.model_validate({"name": guide, **given})
        except ValidationError as error:
            raise ConfigError(describe_errors(error, GuideConfig, "guide")) from None
    elif given:
        raise TypeError(f"load_guide: {', '.join(given)}: a config has it already: change it there")
    found: Guide = _module(guide).load(guide, torch.device(device))
    return found


def layer_channels(config: GuideConfig) -> tuple[int, ...]:
    """Channels of each layer's map, in the order in which the guide concatenates them.

    With it a network on these maps can be built without loading the guide, for example to show its
    size. For DINOv2's own checkpoints the name is enough; for others config.json is read.

    Raises:
        ConfigError: ``guide.file`` defines no guide.
        GuideError: a layer that the guide does not have, or no such checkpoint.
    """
    channels: tuple[int, ...] = _module(config).layer_channels(config)
    return channels


def _module(config: GuideConfig) -> ModuleType:
    if config.file is None:
        return importlib.import_module(f"dinogen.features.{config.name}")
    return _module_of_file(Path(config.file).absolute())


@cache
def _module_of_file(path: Path) -> ModuleType:
    """The user's own guide; its file is run once."""
    module = module_of_file(path, "guide")
    if missing := [name for name in _PARTS if not hasattr(module, name)]:
        raise ConfigError(
            f"guide.file: {path} has no {missing[0]}: docs/new-guide.md shows a guide in one file"
        )
    if default_path(path.stem, str(path)) != module.DEFAULT_PATH:
        raise ConfigError(
            f"guide.file: {path}: DEFAULT_PATH has to be None or a text that is written out: it is "
            "read without running the file"
        )
    return module
