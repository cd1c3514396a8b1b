"""Frozen autoencoders whose posteriors are stored as latents: diffusers' AutoencoderKL, and ours.

Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models". Latents are
the autoencoder's own: diffusers' ``scaling_factor`` is not applied, as what trains on latents
normalises them by the statistics of the data.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from dinogen import hub
from dinogen._torchvision import ensure_torchvision
from dinogen.features.base import GuideError, GuideInfo
from dinogen.features.checkpoint import (
    Wanted,
    checkpoint_folder,
    damage_as_guide_error,
    hash_folder,
    missing_weights,
)
from dinogen.features.transformer import RANDOM_KEY
from dinogen.files import weights_sha256
from dinogen.networks.autoencoder import Autoencoder
from dinogen.runs.layout import CONFIG, EXPORTED_INFO, EXPORTED_SUFFIX, has_stages

KEY = "prepare.latents.path"
EXAMPLE = "stabilityai/sd-vae-ft-mse"
_KL = "AutoencoderKL"
_WEIGHTS = "diffusion_pytorch_model.safetensors"
_OURS = f"{Autoencoder.__module__}.{Autoencoder.__qualname__}"
_LAYER = "posterior"  # what the level holds, where a guide names its layer


class FrozenAutoencoder(nn.Module):
    """Images to posteriors and latents to images; frozen and always in eval mode.

    Computes in float32, regardless of autocast: bfloat16 would round each latent by 0.4 % before
    it is stored, and images to steps of up to one of 255. Differentiable to its input.

    Args:
        model: the network in float32.
        info: its identity, JSON-ready: all of :class:`GuideInfo`, where ``name`` is its kind and
            ``num_channels`` is C, ``factor``, and ``resolution`` where it is known.

    Attributes:
        channels: C of the latents.
        factor: pixels along each side of a location of the latents.
        resolution: side of the images that it was trained on; None if that is not known.
    """

    def __init__(self, model: Any, info: dict[str, Any]) -> None:
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.info = info
        self.training = False
        self.channels: int = info["num_channels"]
        self.factor: int = info["factor"]
        self.resolution: int | None = info.get("resolution")

    def train(self, mode: bool = True) -> FrozenAutoencoder:
        """Does nothing: it is frozen in eval mode."""
        return self

    @property
    def label(self) -> str:
        """Short text for pages and logs; it shows clearly when the weights are random."""
        return GuideInfo.of(self.info).label

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The posteriors of images.

        Args:
            images: (B, 3, R, R) RGB in [-1, 1], R a multiple of ``factor``.

        Returns:
            Mean and log variance, each (B, C, R / factor, R / factor) float32.
        """
        with torch.autocast(images.device.type, enabled=False):
            return self._encode(images.float())

    def decode(self, z: Tensor) -> Tensor:
        """The images (B, 3, R, R) float32 in [-1, 1] of latents (B, C, R / factor, R / factor)."""
        with torch.autocast(z.device.type, enabled=False):
            return self._decode(z.float()).clamp(-1, 1)

    def _encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_variance = self.model.encode(images)
        return mean, log_variance

    def _decode(self, z: Tensor) -> Tensor:
        images: Tensor = self.model.decode(z)
        return images


class _Kl(FrozenAutoencoder):
    """diffusers' class."""

    def _encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        found = self.model.encode(images).latent_dist
        return found.mean, found.logvar

    def _decode(self, z: Tensor) -> Tensor:
        images: Tensor = self.model.decode(z).sample
        return images


def load_autoencoder(
    path: str, device: torch.device, revision: str | None = None, key: str = KEY
) -> FrozenAutoencoder:
    """Load an autoencoder; weights only from safetensors.

    Args:
        path: of diffusers' ``AutoencoderKL``: a hub name, ``hf://user/name[/folder]`` or a local
            folder with config.json and diffusion_pytorch_model.safetensors; or of our own: a file
            of `dinogen export` of a ``vae`` with ``latent_side``, or what `dinogen publish` made
            of one, as an address of the hub or as a folder.
        device: where it will run, in float32.
        revision: hub commit, tag or branch.
        key: of the config that holds the path, which errors name.

    Raises:
        GuideError: diffusers is not installed, the weights are missing, damaged or incomplete, or
            they are of another network; names the key and the remedy.
    """
    file, commit = _exported_file(path, revision, key)
    found = _ours(file, path, commit, key) if file else _kl(path, revision, key)
    return found.to(device)


def _exported_file(path: str, revision: str | None, key: str) -> tuple[Path | None, str | None]:
    """The file of `dinogen export` that a path stands for, with its hub commit; or nothing."""
    if hub.is_address(path):
        try:
            address = hub.parse_section(path, revision, key)
            if address.subpath.endswith(EXPORTED_SUFFIX):
                found = hub.fetch(address)
                return found.path, found.commit
            found = hub.fetch(address, ["config.json", _WEIGHTS, hub.WEIGHTS])
        except hub.HubError as error:
            raise GuideError(f"{key}: {str(error).removeprefix(f'{key}: ')}") from error
        folder, commit = found.path, found.commit
    else:
        folder, commit = Path(path).expanduser(), None
        if folder.suffix == EXPORTED_SUFFIX or folder.is_file():
            if not folder.is_file():
                raise GuideError(
                    f"{key}: there is no file {path}: give a file of `dinogen export`, the folder "
                    f"of an {_KL} of diffusers, or a hub name such as {EXAMPLE}"
                )
            return folder, None
        if (folder / CONFIG).is_file() and has_stages(folder):
            raise GuideError(
                f"{key}: {path} is a run: write its weights to a file with "
                f"`dinogen export {path} vae{EXPORTED_SUFFIX}`, and give that file"
            )
    if (folder / hub.WEIGHTS).is_file() and not (folder / "config.json").is_file():
        return folder / hub.WEIGHTS, commit
    return None, None


def _ours(file: Path, path: str, commit: str | None, key: str) -> FrozenAutoencoder:
    """The autoencoder in a file of `dinogen export`."""
    with damage_as_guide_error(key, path):
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata() or {}
        told = json.loads(metadata.get(EXPORTED_INFO, "null"))
        tensors: dict[str, Tensor] = load_file(file)
    network = told.get("network") if isinstance(told, dict) else None
    arguments = network.get("arguments") if isinstance(network, dict) else None
    if not isinstance(network, dict) or not isinstance(arguments, dict):
        raise GuideError(
            f"{key}: {path} was not written by `dinogen export`: give a file that it wrote, or the "
            f"folder of an {_KL} of diffusers"
        )
    if network.get("class") != _OURS or not arguments.get("latent_side"):
        what = (
            "has a vector as its latent" if network.get("class") == _OURS else "encodes no images"
        )
        raise GuideError(
            f"{key}: {path}, of family {told.get('family')}, {what}: give an export of a vae or "
            "vae_gan that was trained with family.latent_side, as vae_latent_64.yaml is"
        )
    with damage_as_guide_error(key, path):
        model = Autoencoder(**arguments)
        if missing := sorted(set(model.state_dict()) - set(tensors)):
            raise missing_weights(key, path, missing)
        model.load_state_dict(tensors)
    info = GuideInfo(
        name="vae",
        path=path,
        revision=commit,
        weights_sha256=weights_sha256(tensors),
        num_channels=model.shape[0],
        layer=_LAYER,
        random=bool(told.get("random_guide")),
    )
    sizes = {"factor": model.resolution // model.latent_side, "resolution": model.resolution}
    return FrozenAutoencoder(model, info.to_dict() | sizes)


def _kl(path: str, revision: str | None, key: str) -> FrozenAutoencoder:
    """diffusers' AutoencoderKL."""
    wanted = Wanted(key, EXAMPLE, ("config.json", _WEIGHTS))
    folder = Path(path).expanduser()
    if not hub.is_address(path) and (folder / "model_index.json").is_file():
        raise GuideError(f"{key}: {path} is a whole pipeline: give its autoencoder, {path}/vae")
    folder, commit = checkpoint_folder(path, revision, wanted)
    with damage_as_guide_error(key, path):
        settings: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kind = settings.get("_class_name") or settings.get("model_type")
    if kind != _KL:
        raise GuideError(
            f"{key}: {path} holds a network of class {kind}, not {_KL}: give one such as {EXAMPLE}"
        )
    if not (folder / _WEIGHTS).is_file():
        raise GuideError(
            f"{key}: {path} lacks {_WEIGHTS}: give the folder of a whole {_KL}, as save_pretrained "
            "writes it"
        )
    model = _read_kl(folder, key, path)
    info = GuideInfo(
        name="autoencoder_kl",
        path=path,
        revision=commit,
        weights_sha256=hash_folder(folder, _WEIGHTS),
        num_channels=int(model.config.latent_channels),
        layer=_LAYER,
        random=bool(settings.get(RANDOM_KEY, False)),
    )
    return _Kl(model, info.to_dict() | {"factor": 2 ** (len(model.config.block_out_channels) - 1)})


def _read_kl(folder: Path, key: str, path: str) -> Any:
    """diffusers' network in float32; no missing weight is initialised randomly."""
    ensure_torchvision()
    try:
        from diffusers import AutoencoderKL
    except ImportError as error:
        raise GuideError(
            f"{key}: {path} is an {_KL}, which needs the package diffusers: "
            "pip install 'dinogen[latents]'"
        ) from error
    with damage_as_guide_error(key, path), _quiet_diffusers():
        model, report = AutoencoderKL.from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            torch_dtype=torch.float32,
            low_cpu_mem_usage=False,
            output_loading_info=True,
        )
    if report["missing_keys"]:
        raise missing_weights(key, path, sorted(report["missing_keys"]))
    return model


@contextmanager
def _quiet_diffusers() -> Iterator[None]:
    """Turn off diffusers' warnings of missing and unknown keys; we raise an error of our own."""
    from diffusers.utils import logging as theirs

    verbosity = theirs.get_verbosity()
    theirs.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        theirs.set_verbosity(verbosity)
