"""Runs on latents: the same as on pixels where the autoencoder does nothing; exports; resuming."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from dinogen.features.autoencoder import FrozenAutoencoder
from dinogen.training.checkpointing.checkpoint import newest_checkpoint
from dinogen.training.checkpointing.snapshot import load_snapshot
from dinogen.training.run import train
from shards.format.sample import Sample
from shards.write.shard_writer import pack
from tests.families.tiny import tiny_config


class Identity(FrozenAutoencoder):
    """Its latents are the images."""

    def __init__(self) -> None:
        info = {"name": "identity", "path": "identity", "revision": None, "layer": "posterior"}
        info |= {"weights_sha256": "0" * 64, "num_channels": 3, "factor": 1, "random": False}
        super().__init__(torch.nn.Identity(), info)

    def _encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return images, torch.full_like(images, -60000)

    def _decode(self, z: Tensor) -> Tensor:
        return z


@pytest.fixture(scope="module")
def black_and_white(tmp_path_factory):
    """Images of -1 and 1, each with its negative: exact in float16, of mean 0 and deviation 1."""
    folder = tmp_path_factory.mktemp("identity")
    rng = np.random.default_rng(0)
    half = rng.integers(0, 2, (8, 16, 16, 3), dtype=np.uint8) * 255
    samples = []
    for number, pixels in enumerate(np.concatenate([half, 255 - half])):
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        mean = (pixels.astype(np.float32) / 127.5 - 1).reshape(256, 3)
        level = np.concatenate([mean, np.full((256, 3), -60000)], 1).astype(np.float16)
        samples.append(Sample(f"s{number:02d}", file.getvalue(), "png", {}, {"latents.n16": level}))
    pack(samples, folder / "data", shard_size=8, guides={"latents": Identity().info})
    return folder / "data"


@pytest.mark.parametrize("family", ["flow", "ddpm"])
def test_with_an_autoencoder_that_does_nothing_a_run_is_that_on_pixels(
    family, black_and_white, tmp_path, monkeypatch
):
    monkeypatch.setattr("dinogen.families.latent.load_autoencoder", lambda *arguments: Identity())
    tensors, images = [], []
    for name, more in {
        "pixels": (),
        "latents": ("family.latent.channels=3", "family.latent.factor=1"),
    }.items():
        config = tiny_config(family, black_and_white, tmp_path / name, *more)
        train(config)
        found = newest_checkpoint(config.run / "16x16" / "checkpoints")
        tensors.append(found.tensors("G"))
        snapshot = load_snapshot(config.run)
        assert snapshot.family.inputs.image_size == (None if more else 16)
        # pixels are kept in [-1, 1] on the way, latents are not
        monkeypatch.setattr(type(snapshot.family), "_bounded", False)
        images.append(snapshot.sample(3, seed=1))
        monkeypatch.undo()
        monkeypatch.setattr(
            "dinogen.families.latent.load_autoencoder", lambda *arguments: Identity()
        )
    pixels, latents = tensors
    assert latents.pop("latent_scale.mean").tolist() == [0, 0, 0]
    assert latents.pop("latent_scale.deviation").tolist() == [1, 1, 1]
    assert pixels.keys() == latents.keys()
    assert [name for name, value in pixels.items() if not torch.equal(value, latents[name])] == []
    assert torch.equal(*images)
