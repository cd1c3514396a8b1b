"""CLIP: images and captions as unit vectors in one space, close if they match.

Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", 2021. The
network is that of transformers.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from dinogen._torchvision import ensure_torchvision
from dinogen.config.training import ClipConfig
from dinogen.features.base import GuideError, guide_dtype
from dinogen.features.checkpoint import (
    Wanted,
    checkpoint_folder,
    damage_as_guide_error,
    hash_folder,
    quiet_transformers,
    read_model,
)
from dinogen.features.transformer import RANDOM_KEY

# From CLIP's authors; a checkpoint's preprocessor_config.json may override them.
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)

KEY = "clip.path"
# Not every *.safetensors: LAION's checkpoints hold the same weights twice, under open_clip's names.
_WEIGHTS = "model*.safetensors"
_WANTED = Wanted(
    KEY,
    "openai/clip-vit-large-patch14",
    (
        "config.json",
        _WEIGHTS,
        "model.safetensors.index.json",
        "preprocessor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.json",
        "merges.txt",
        "special_tokens_map.json",
    ),
)
# Before transformers 4.31 configs said 2, which is wrong for every CLIP: the end is its highest
# token then.
_OLD_END = 2
# CLIPs that agree in these give the same embeddings. Not the path: weights may be copied.
_IDENTITY = ("weights_sha256", "image_mean", "image_std")

_logger = logging.getLogger(__name__)


class Clip(nn.Module):
    """Both towers, frozen and always in eval mode.

    Computes in the dtype of the model's weights, regardless of autocast, and returns float32.

    Args:
        model: ``CLIPModel`` of transformers, in float32 or bfloat16.
        tokenizer: that of its checkpoint.
        info: its identity, JSON-ready: ``name``, ``path``, ``revision``, ``weights_sha256``,
            ``embed_dim`` (E), ``image_size``, ``image_mean``, ``image_std`` and ``random``.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, model: Any, tokenizer: Any, info: dict[str, Any]) -> None:
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.info = info
        self.training = False
        self.embed_dim: int = info["embed_dim"]
        self.image_size: int = info["image_size"]
        self.max_tokens = int(model.config.text_config.max_position_embeddings)
        self.dtype: torch.dtype = model.logit_scale.dtype
        mean = torch.tensor(info["image_mean"]).view(1, 3, 1, 1)
        std = torch.tensor(info["image_std"]).view(1, 3, 1, 1)
        self.register_buffer("scale", 0.5 / std, persistent=False)
        self.register_buffer("shift", (0.5 - mean) / std, persistent=False)

    def train(self, mode: bool = True) -> Clip:
        """Does nothing: it is frozen in eval mode."""
        return self

    def images(self, images: Tensor) -> Tensor:
        """Embeddings of images, differentiable to the pixels.

        Args:
            images: (B, 3, R, R) RGB in [-1, 1], of any size.

        Returns:
            (B, E) float32 of length 1.

        Raises:
            ValueError: images that are not square.
        """
        height, width = images.shape[-2:]
        if height != width:
            raise ValueError(f"CLIP needs square images, not {height}x{width}")
        pixels = images.float()
        if width != self.image_size:
            # antialias also when enlarging: only then it is Pillow's bicubic, as in CLIP's training
            size = (self.image_size, self.image_size)
            pixels = F.interpolate(pixels, size, mode="bicubic", antialias=True)
        pixels = pixels * self.scale + self.shift
        with torch.autocast(images.device.type, enabled=False):
            pooled = self.model.vision_model(pixel_values=pixels.to(self.dtype)).pooler_output
            embedded: Tensor = self.model.visual_projection(pooled)
        return F.normalize(embedded.float(), dim=1)

    @torch.no_grad()
    def captions(self, captions: list[str]) -> Tensor:
        """Embeddings of texts; texts that are too long are cut, with a warning.

        Args:
            captions: at least one.

        Returns:
            (B, E) float32 of length 1, on the network's device.
        """
        tokens = self.tokens(captions).to(self.scale.device)
        with torch.autocast(tokens.device.type, enabled=False):
            pooled = self.model.text_model(input_ids=tokens).pooler_output
            embedded: Tensor = self.model.text_projection(pooled)
        return F.normalize(embedded.float(), dim=1)

    def tokens(self, captions: list[str]) -> Tensor:
        """(B, L) int64 on the CPU: each from its start token to its end token, then padding.

        Padded with the end token, as in CLIP; attention is causal, so no caption depends on the
        longest of its batch.
        """
        with quiet_transformers():
            found = self.tokenizer(captions, padding=False, truncation=False)["input_ids"]
        end = self.tokenizer.eos_token_id
        most = self.max_tokens
        long = [text for text, ids in zip(captions, found, strict=True) if len(ids) > most]
        if long:
            _logger.warning(
                "%d of %d captions cut to the %d tokens that CLIP reads: %.40r, ...",
                len(long),
                len(captions),
                most,
                long[0],
            )
        cut = [[*ids[: most - 1], end] if len(ids) > most else ids for ids in found]
        return pad_sequence([torch.tensor(ids) for ids in cut], True, padding_value=end)


def load_clip(config: ClipConfig, device: torch.device) -> Clip:
    """Load CLIP by hub name or from a local checkpoint folder; safetensors only.

    Args:
        config: ``path`` and ``revision`` of the checkpoint.
        device: where it will run; its weights are in :func:`guide_dtype` of it.

    Raises:
        GuideError: weights or tokenizer are missing, damaged or incomplete, or belong to another
            network.
    """
    path = config.path
    folder, revision = checkpoint_folder(path, config.revision, _WANTED)
    ensure_torchvision()
    import transformers

    with damage_as_guide_error(KEY, path):
        found: Any = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        if found.model_type != "clip":
            raise GuideError(
                f"{KEY}: {path} holds a {found.model_type!r} network: give a CLIP checkpoint, "
                f"such as {_WANTED.example}"
            )
        model = read_model(transformers.CLIPModel, folder, found, KEY, path)
        tokenizer = _read_tokenizer(folder, found.text_config, path)
        mean, std = _read_normalisation(folder)
        weights = hash_folder(folder, _WEIGHTS)
    random = bool(getattr(found, RANDOM_KEY, False))
    if random:
        _logger.warning(
            "RANDOM CLIP: %s has seeded random weights; its embeddings are only good for a trial",
            path,
        )
    info = {
        "name": "clip",
        "path": path,
        "revision": revision,
        "weights_sha256": weights,
        "embed_dim": int(found.projection_dim),
        "image_size": int(found.vision_config.image_size),
        "image_mean": mean,
        "image_std": std,
        "random": random,
    }
    return Clip(model.to(guide_dtype(device)), tokenizer, info).to(device)


def same_clip(made_by: Mapping[str, Any], info: Mapping[str, Any]) -> bool:
    """Whether two CLIPs, described by ``Clip.info``, give the same embeddings."""
    return all(made_by.get(name) == info.get(name) for name in _IDENTITY)


def _read_tokenizer(folder: Path, text_config: Any, path: str) -> Any:
    """The checkpoint's tokenizer; transformers would make an empty one if its files are missing."""
    import transformers

    whole = (folder / "tokenizer.json").is_file()
    if not whole and not all((folder / name).is_file() for name in ("vocab.json", "merges.txt")):
        raise GuideError(
            f"{KEY}: {path} lacks its tokenizer (tokenizer.json, or vocab.json and merges.txt): "
            "download the whole checkpoint again"
        )
    tokenizer: Any = transformers.CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    end = text_config.eos_token_id
    if len(tokenizer) > text_config.vocab_size or end not in (_OLD_END, tokenizer.eos_token_id):
        raise GuideError(
            f"{KEY}: the tokenizer of {path} ({len(tokenizer)} tokens, end "
            f"{tokenizer.eos_token_id}) is not that of its network ({text_config.vocab_size}, end "
            f"{end}): download the whole checkpoint again"
        )
    return tokenizer


def _read_normalisation(folder: Path) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel that the network expects."""
    file = folder / "preprocessor_config.json"
    settings = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    mean, std = settings.get("image_mean", IMAGE_MEAN), settings.get("image_std", IMAGE_STD)
    return [float(value) for value in mean], [float(value) for value in std]
