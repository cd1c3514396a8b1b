"""Shards for a config, packed from noise: images, levels, labels, embeddings as it reads them."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from dinogen._torchvision import ensure_torchvision
from dinogen.config import Config, load_config
from dinogen.config.base import SHIPPED
from dinogen.families.base import Family
from dinogen.families.latent import LatentOptions
from dinogen.families.registry import family_class, resolve
from dinogen.features.autoencoder import load_autoencoder
from dinogen.features.base import GuideInfo
from dinogen.features.checkpoint import quiet_transformers
from dinogen.features.clip import load_clip
from dinogen.features.dinov2 import make_random_dinov2
from dinogen.features.load import load_guide
from dinogen.features.transformer import RANDOM_KEY, write_random
from dinogen.networks.autoencoder import Autoencoder
from dinogen.runs.layout import EXPORTED_INFO
from shards.format.sample import FLIPPED, OF_LATENTS, VECTORS, Sample, level_grid, level_guide
from shards.write.shard_writer import pack

NUM_SAMPLES = 24
GUIDE = {"image_size": 518}  # as DINOv2-small was trained


def config_with_data(
    name: str, folder: Path, overrides: Sequence[str] = (), guide: dict[str, int] = GUIDE
) -> Config:
    """A config whose data, random guide and run are in ``folder``, where they are made.

    Args:
        name: of a shipped config, or a YAML file.
        folder: an empty one.
        overrides: ``key=value``, as behind the command ``dinogen train``.
        guide: arguments of ``make_random_dinov2``; the shape of DINOv2-small by default.
    """
    file = Path(name) if name.endswith(".yaml") else SHIPPED / f"{name}.yaml"
    own = [f"data.path={folder}/data", "data.mix=[]", f"run={folder}/run", "data.num_threads=0"]
    own += ["eval.every_kimg=null", "eval.every_epochs=null", "eval.patience=null"]
    config = load_config(file, own)
    own += [
        f"stages.{number}.kimg={kimg}"
        for number, stage in enumerate(config.stages)
        if (kimg := stage.kimg or 1000)
    ]
    main = load_config(file, [*own, *overrides]).guide
    guided = config.family.name == "guided" or (
        config.family.options.get("repa") or config.family.options.get("representation")
    )
    if guided and main.name in ("dinov2", "dinov3", "siglip", "timm"):
        make_random_guide(main.name, folder / "guide", guide)
        own += [f"guide.path={folder}/guide", "guide.revision=null"]
    if config.clip is not None:
        _make_random_clip(folder / "clip", config.family.options["text"]["embed_dim"])
        own += [f"clip.path={folder}/clip", "clip.revision=null"]
    if config.family.options.get("lambda_perceptual"):
        own.append("family.perceptual_weights=random")
    # a number is the size of a vae's own
    if isinstance(latent := config.family.options.get("latent"), Mapping):
        size = max(stage.resolution for stage in config.stages)
        _make_random_autoencoder(folder / "vae.safetensors", size, LatentOptions(**latent))
        own += [f"family.latent.path={folder}/vae.safetensors", "family.latent.revision=null"]
    config = resolve(load_config(file, [*own, *overrides]))
    _pack(config, folder / "data")
    return config


def make_random_guide(name: str, folder: Path, shape: dict[str, int]) -> None:
    """A checkpoint of a guide with random weights.

    Args:
        name: ``dinov2``, ``dinov3`` (ViT-S/16), ``siglip`` (B/16 for 256 pixels) or ``timm`` (its
            conversion of DINOv3's ViT-S/16).
        folder: must not exist yet.
        shape: arguments of ``make_random_dinov2``.
    """
    if name == "dinov2":
        make_random_dinov2(folder, seed=0, **shape)
    elif name == "timm":
        ensure_torchvision()
        from timm import create_model

        settings = {"architecture": "vit_small_patch16_dinov3", RANDOM_KEY: True}
        model = create_model(settings["architecture"])
        folder.mkdir()
        save_file(model.state_dict(), folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(settings))
    else:
        classes = {"dinov3": "DINOv3ViT", "siglip": "SiglipVision"}
        own = {"dinov3": {"num_register_tokens": 4}, "siglip": {"image_size": 256}}[name]

        def build(hf: Any) -> Any:
            config = getattr(hf, f"{classes[name]}Config")(**own, **{RANDOM_KEY: True})
            return getattr(hf, f"{classes[name]}Model")(config)

        write_random(folder, 0, build)


def _pack(config: Config, out: Path) -> None:
    """Random samples that all stages of a config can read."""
    families = [_on_meta(config, number) for number in range(len(config.stages))]
    levels = sorted({level for family in families for level in family.inputs.levels})
    vectors = [level for level in levels if level in VECTORS]
    latents = [level for level in levels if level_guide(level) in OF_LATENTS]
    names = {level_guide(level) for level in levels if level not in (*VECTORS, *latents)}
    if config.family.name == "guided":
        names.add("")  # the shards have to be made by its guide, also if no level of it is read
    guides = {name: _identity(config, name) for name in names}
    autoencoder = None
    if latents:
        autoencoder = load_autoencoder(config.family.options["latent"]["path"], torch.device("cpu"))
    clip = load_clip(config.clip, torch.device("cpu")) if vectors and config.clip else None
    num_classes = int(config.family.options.get("num_classes") or 0)
    size = max(stage.resolution for stage in config.stages)
    rng = np.random.default_rng(0)
    samples = []
    for number in range(NUM_SAMPLES):
        colours = rng.integers(0, 255, (size // 4, size // 4, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(colours).resize((size, size)).save(file, "PNG")
        arrays = {name: rng.normal(size=(1, clip.embed_dim)) for name in vectors if clip}
        for level in levels:
            if level not in VECTORS:
                if level in latents and autoencoder is not None:
                    channels = 2 * autoencoder.channels
                else:
                    channels = guides[level_guide(level)].num_channels
                arrays[level] = rng.uniform(-1, 1, (level_grid(level) ** 2, channels))
        arrays = {name: array.astype(np.float16) for name, array in arrays.items()}
        label = number % num_classes if num_classes else None
        samples.append(Sample(f"s{number:03d}", file.getvalue(), "png", {}, arrays, label=label))
    identities = {name: info.to_dict() for name, info in guides.items()}
    if autoencoder is not None:
        identities |= {level_guide(level): autoencoder.info for level in latents}
    facts: dict[str, Any] = {"guide": identities.pop("", None), "guides": identities}
    facts["classes"] = [f"class {number}" for number in range(num_classes)]
    pack(samples, out, shard_size=8, clip=clip.info if clip else None, **facts)


def _identity(config: Config, name: str) -> GuideInfo:
    """Of a guide by the name that shards have for it, also for its features of mirrored images."""
    own = name.removesuffix(FLIPPED).removesuffix("_")
    return load_guide(config.guides[own] if own else config.guide).info


def _make_random_autoencoder(file: Path, resolution: int, latent: LatentOptions) -> None:
    """A file of `dinogen export` of a small vae, with latents of the shape that a config reads."""
    arguments = {"resolution": resolution, "latent": latent.channels, "base_channels": 8}
    arguments["latent_side"] = resolution // latent.factor
    network = Autoencoder(**arguments)
    of_class = f"{Autoencoder.__module__}.{Autoencoder.__qualname__}"
    info = {"random_guide": True, "network": {"class": of_class, "arguments": arguments}}
    save_file(network.state_dict(), file, {EXPORTED_INFO: json.dumps(info)})


def _make_random_clip(folder: Path, embed_dim: int) -> None:
    """A checkpoint whose image tower has CLIP ViT-B/32's shape, with few words and a small one for
    them, which no step runs.
    """
    ensure_torchvision()
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    start, end = "<|startoftext|>", "<|endoftext|>"
    letters = [letter + after for letter in "abcdefghijklmnopqrstuvwxyz" for after in ("", "</w>")]
    words = {token: number for number, token in enumerate([*letters, start, end])}
    tokenizer = CLIPTokenizer(vocab=words, merges=[], model_max_length=77)
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 2, "vocab_size": len(words), "eos_token_id": words[end]}
    text |= {"bos_token_id": words[start], "pad_token_id": words[end]}
    settings = CLIPConfig(text_config=text, vision_config={}, projection_dim=embed_dim)
    with quiet_transformers():
        CLIPModel(settings).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _on_meta(config: Config, number: int) -> Family:
    """The family at a stage; its networks take no memory."""
    meta = torch.device("meta")
    with meta:
        return family_class(config.family)(config, config.stages[number], meta)
