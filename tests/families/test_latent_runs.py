"""Runs on latents: the same as on pixels where the autoencoder does nothing; exports; resuming."""

from __future__ import annotations

import functools
import io
import shutil

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner

from dinogen._torchvision import ensure_torchvision
from dinogen.config import ConfigError
from dinogen.distributed import rng
from dinogen.evaluation.evaluate import evaluate
from dinogen.families import latent
from dinogen.families.abilities import spaces_of
from dinogen.features.autoencoder import FrozenAutoencoder
from dinogen.features.base import GuideError
from dinogen.training.checkpointing.checkpoint import newest_checkpoint
from dinogen.training.checkpointing.export import export, load_generator
from dinogen.training.checkpointing.snapshot import load_snapshot
from dinogen.training.run import train
from dinogen.training.state import StageState
from launch.cli.main import app
from shards import open_dataset
from shards.format.sample import Sample
from shards.write.shard_writer import pack
from tests.families.stored_latents import pack_latents
from tests.families.tiny import RESOLUTION, TINY, discs, tiny_config
from tests.features.autoencoders import write_kl, write_ours


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


@pytest.fixture(scope="module")
def trained(disc_data, tmp_path_factory):
    """A run on latents; its data and autoencoder are those of ``disc_data``, copied."""
    folder = tmp_path_factory.mktemp("trained")
    shutil.copytree(disc_data.parent, folder, dirs_exist_ok=True)
    config = tiny_config("flow-latent", folder / "data", folder / "run", "augment.flip=0.5")
    own = f"family.latent.path={folder}/vae.safetensors"
    train(tiny_config("flow-latent", folder / "data", folder / "run", "augment.flip=0.5", own))
    return config.run


@pytest.fixture
def place(trained, tmp_path):
    """The folder of that run in another place, where nothing but its copy is left."""
    shutil.copytree(trained.parent, tmp_path / "all")
    return tmp_path / "all"


def moved(place, name="elsewhere.safetensors"):
    """The autoencoder in a place that nothing names, while the first place is gone."""
    (place / "vae.safetensors").rename(place / name)
    return place / name


def settings(run, **latent):
    """Change ``family.latent`` in the run's config.yaml."""
    file = run / "config.yaml"
    told = yaml.safe_load(file.read_text())
    told["family"]["latent"] |= latent
    told["data"]["path"] = str(run.parent / "data")
    file.write_text(yaml.safe_dump(told))


def test_an_export_draws_the_images_of_the_run_from_one_load(trained, tmp_path, monkeypatch):
    info = export(trained, tmp_path / "flow.safetensors").info
    assert info["autoencoder"]["path"].endswith("vae.safetensors")
    assert info["network"]["arguments"]["scaled_latents"] is True
    loads = []
    load = latent.load_autoencoder
    monkeypatch.setattr(latent, "load_autoencoder", lambda *a: (loads.append(a[0]), load(*a))[1])
    generator = load_generator(tmp_path / "flow.safetensors")
    assert loads == []
    images = generator.sample(3, seed=2)
    assert torch.equal(images, load_snapshot(trained).sample(3, seed=2))
    generator.sample(2, seed=3)
    assert len(loads) == 2  # one for each generator
    assert images.shape == (3, 3, 16, 16) and images.std() > 0.01


def test_mirrored_latents_are_those_that_the_trainer_chose(disc_data, tmp_path, monkeypatch):
    config = tiny_config("flow-latent", disc_data, tmp_path, "augment.flip=0.5")
    seen = []
    drawn = latent.Latents.drawn

    def record(self, batch, scale, kind=""):
        found = drawn(self, batch, scale, kind)
        if not kind:
            seen.append((batch, found, scale))
        return found

    monkeypatch.setattr(latent.Latents, "drawn", record)
    train(config)
    assert len(seen) == 4
    for batch, found, scale in seen:
        chosen = rng.uniform(config.seed, "augment/flip", batch["position"]) < 0.5
        assert torch.equal(batch["flipped"], chosen) and "image" not in batch
        stored = torch.stack(
            [
                batch["guides"]["latents_flipped" if one else "latents"][4][n]
                for n, one in enumerate(chosen)
            ]
        )
        mean, log_variance = stored.float().mT.unflatten(2, (4, 4)).chunk(2, 1)
        eps = rng.normal(config.seed, "latent", batch["position"], (3, 4, 4))
        expected = scale.normalized(mean + torch.exp(log_variance / 2) * eps)
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("augment.rotate=5", r"augment: .*leave it out, but for flip"),
        ("augment.brightness=0.1", "reads no images at stage 16"),
        ("family.latent.factor=2", "set family.latent.channels=3 and family.latent.factor=4"),
        ("family.latent.channels=4", "set family.latent.channels=3 and family.latent.factor=4"),
        ("family.latent.sample=mode", "'posterior' or 'mean'"),
        ("stages.0.resolution=8", "train one stage of 16"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_the_first_step(
    change, message, disc_data, tmp_path
):
    more = ("augment.flip=0.5", "family.attention_resolutions=[]", change)
    with pytest.raises(ConfigError, match=message):
        train(tiny_config("flow-latent", disc_data, tmp_path / "run", *more))
    assert not (tmp_path / "run" / f"{RESOLUTION}x{RESOLUTION}").exists()


def test_an_autoencoder_that_has_moved_is_found_by_the_config_or_beside_the_run(place):
    run = place / "run"
    expected = load_snapshot(run).sample(2, seed=0)
    there = moved(place)
    settings(run, path=str(place / "vae.safetensors"))
    with pytest.raises(GuideError, match=rf"there is no file .*link to it, at {run}/vae.safe"):
        load_snapshot(run).sample(2, seed=0)
    (run / "vae.safetensors").symlink_to(there)
    assert torch.equal(load_snapshot(run).sample(2, seed=0), expected)
    (run / "vae.safetensors").unlink()
    settings(run, path=str(there))
    assert torch.equal(load_snapshot(run).sample(2, seed=0), expected)
    changes = (f"family.latent.path={there}", f"data.path={place}/data")
    found = evaluate(run, num_samples=8, names=["spectrum"], changes=changes)
    assert found["measured"]["spectrum"]["value"] > 0


def test_training_goes_on_with_the_same_autoencoder_elsewhere_and_no_other(place):
    run, there = place / "run", moved(place)
    more = ("augment.flip=0.5", "stages.0.kimg=0.04", f"family.latent.path={there}")
    train(tiny_config("flow-latent", place / "data", run, *more))
    assert newest_checkpoint(run / "16x16" / "checkpoints").state["progress"]["nimg"] == 40
    write_ours(there, seed=1)
    more = (*more, "stages.0.kimg=0.048")
    with pytest.raises(ConfigError, match=r"family.latent.path: .* is not the autoencoder that"):
        train(tiny_config("flow-latent", place / "data", run, *more))


def test_weights_of_a_run_on_another_autoencoder_are_taken_with_a_warning(
    trained, tmp_path, monkeypatch, caplog
):
    export(trained, tmp_path / "flow.safetensors")
    other = functools.partial(write_ours, seed=1)
    monkeypatch.setattr("tests.families.stored_latents.write_ours", other)
    pack_latents(tmp_path)
    said = "was trained with another network in family.latent.path (SHA-256"
    for source in (trained, tmp_path / "flow.safetensors"):
        for data, differs in ((tmp_path / "data", True), (trained.parent / "data", False)):
            caplog.clear()
            config = tiny_config("flow-latent", data, tmp_path / "run", f"init_from={source}")
            StageState(config, 0)
            assert (said in caplog.text) is differs


def test_photos_are_encoded_and_walked_back(trained):
    snapshot = load_snapshot(trained)
    family, networks = snapshot.family.with_sampling({"steps": 50}), snapshot.ema.networks
    numbers = torch.arange(2)
    images = family.sample(networks, numbers, seed=1)
    z = family.invert(networks, images, numbers)
    assert z.shape == (2, 3, 4, 4) == (2, *spaces_of(family)["z"].shape)
    again = family.decode(networks, z, numbers, 1)
    # what the autoencoder itself does to an image is all that is lost
    encoder = family.latent.autoencoder
    once = encoder.decode(encoder.encode(images)[0])
    torch.testing.assert_close(again, once, rtol=0, atol=0.02)


def test_the_held_out_loss_reads_the_scale_of_the_average(trained):
    """A family that only samples has networks of its own that were never trained."""
    snapshot = load_snapshot(trained)
    data = open_dataset(trained.parent / "data")
    batch = data.read(range(6), split="val", levels=snapshot.family.inputs.levels)
    found = snapshot.family.held_out(snapshot.ema.networks, batch)
    state = StageState(snapshot.family.config, 0)
    expected = state.family.held_out(state.ema.networks, batch)
    assert torch.equal(found["v"], expected["v"])


def test_prepared_with_diffusers_autoencoder_trained_drawn_and_exported(tmp_path):
    """AutoencoderKL, from photos to an exported file."""
    (tmp_path / "photos").mkdir()
    for number, pixels in enumerate(discs(12)):
        Image.fromarray(pixels).save(tmp_path / f"photos/{number}.png")
    write_kl(tmp_path / "kl")
    told = {
        "run": str(tmp_path / "run"),
        "prepare": {
            "faces": {"size": 16, "detect": "none", "format": "png"},
            "latents": {"path": str(tmp_path / "kl")},
        },
        "data": {"path": str(tmp_path / "data"), "num_threads": 0},
        "family": {"name": "flow", **TINY["flow-latent"], "latent": {"channels": 2, "factor": 4}},
        "stages": [{"resolution": 16, "kimg": 0.016, "batch": 8, "lr": 0.001}],
        "log": {"every_kimg": 0.008, "num_samples": 4},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(told))
    for command in (
        f"prepare {tmp_path}/photos {tmp_path}/data -c {tmp_path}/config.yaml",
        f"train {tmp_path}/config.yaml",
        f"export {tmp_path}/run {tmp_path}/flow.safetensors",
    ):
        done = CliRunner().invoke(app, command.split())
        assert done.exit_code == 0, f"{command}\n{done.output}\n{done.exception!r}"
    images = load_generator(tmp_path / "flow.safetensors").sample(2)
    assert torch.equal(images, load_snapshot(tmp_path / "run").sample(2, seed=0))
    snapshot = load_snapshot(tmp_path / "run")
    scale = snapshot.ema.networks["G"].latent_scale
    ensure_torchvision()
    from diffusers import AutoencoderKL

    theirs = AutoencoderKL.from_pretrained(tmp_path / "kl").eval()
    with torch.no_grad():
        expected = theirs.decode(scale.mean.expand(1, 4, 4, 2).permute(0, 3, 1, 2)).sample
    found = snapshot.family.latent.decoded(torch.zeros(1, 2, 4, 4), scale)
    torch.testing.assert_close(found, expected.clamp(-1, 1))
