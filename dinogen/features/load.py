"""Loads a guide by its name or its config, and finds how many channels its layers have."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from pydantic import ValidationError

from dinogen.config import ConfigError, GuideConfig
from dinogen.config.base import describe_errors
from dinogen.features import inception, onet, pixels
from dinogen.features.base import Guide, GuideError
from dinogen.features.checkpoint import checkpoint_folder


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

    A new network is one new file ``dinogen/features/NAME.py`` with a function
    ``load(config, device) -> Guide``, and its name in ``GuideConfig.name``.

    Args:
        guide: ``dinov2``, ``inception``, ``onet`` or ``pixels``; or the section ``guide`` of
            a config, which says everything else but the device.
        device: where it will run.
        path: hub name, address of the hub, checkpoint folder or weights file; default: that of
            ``GuideConfig``.
        layer: which layer, or several whose channels are concatenated; default: the last. They are
            block numbers of ``dinov2``, ``pool1``, ``pool2``, ``mixed_5d`` and ``mixed_6e`` of
            ``inception``, and ``conv1``, ``conv2``, ``conv3``, ``pool3`` and ``conv4`` of ``onet``.
        revision: hub commit, tag or branch.

    Raises:
        ConfigError: no guide has this name, or ``layer`` is none.
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
    module = importlib.import_module(f"dinogen.features.{guide.name}")
    found: Guide = module.load(guide, torch.device(device))
    return found


# Oquab et al. 2023, "DINOv2: Learning Robust Visual Features without Supervision", table 17
_HIDDEN_SIZES = {"small": 384, "base": 768, "large": 1024, "giant": 1536}
_PUBLISHED = re.compile(rf"facebook/dinov2-(?:with-registers-)?({'|'.join(_HIDDEN_SIZES)})")


def layer_channels(config: GuideConfig) -> tuple[int, ...]:
    """Channels of each layer's map, in the order in which the guide concatenates them.

    With it a network on these maps can be built without loading the guide, for example to show its
    size. For DINOv2's own checkpoints the name is enough; for others config.json is read.

    Raises:
        GuideError: a layer that the guide does not have, or no such checkpoint.
    """
    layers = config.layer if isinstance(config.layer, tuple) else (config.layer,)
    if config.name == "pixels":
        return (pixels.NUM_CHANNELS,)
    if config.name == "onet":
        return tuple(onet.LAYERS[name] for name in onet.layer_names(config))
    if config.name == "inception":
        names = [inception.LAST if layer == -1 else str(layer) for layer in layers]
        if wrong := [name for name in names if name not in inception.LAYERS]:
            raise GuideError(
                f"guide.layer: {wrong[0]}: the Inception guide has the layers "
                f"{', '.join(inception.LAYERS)}; -1 is the last"
            )
        return tuple(inception.LAYERS[name] for name in names)
    return (_hidden_size(config),) * len(layers)


def _hidden_size(config: GuideConfig) -> int:
    published = _PUBLISHED.fullmatch(config.path)
    if published and not Path(config.path).exists():
        return _HIDDEN_SIZES[published[1]]
    folder, _ = checkpoint_folder(config.path, config.revision)
    try:
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return int(settings["hidden_size"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise GuideError(
            f"guide.path: {config.path} is damaged (config.json has no hidden_size): download the "
            "whole checkpoint again"
        ) from error
