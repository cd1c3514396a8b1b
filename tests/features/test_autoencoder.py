"""Autoencoders for latents: diffusers' against diffusers itself, ours against its family."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dinogen import hub
from dinogen._torchvision import ensure_torchvision
from dinogen.features.autoencoder import FrozenAutoencoder, load_autoencoder
from dinogen.features.base import GuideError
from dinogen.files import weights_sha256
from dinogen.networks.autoencoder import Autoencoder
from dinogen.runs.layout import EXPORTED_INFO
from tests.features.autoencoders import WEIGHTS, write_kl, write_ours

ensure_torchvision()

from diffusers import AutoencoderKL  # noqa: E402 - torchvision comes first

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def kl(tmp_path_factory) -> Path:
    return write_kl(tmp_path_factory.mktemp("weights") / "kl")


@pytest.fixture
def images():
    return torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_posteriors_and_images_are_those_of_diffusers(kl, images):
    found, theirs = load_autoencoder(str(kl), CPU), AutoencoderKL.from_pretrained(kl).eval()
    with torch.no_grad():
        posterior = theirs.encode(images).latent_dist
        mean, log_variance = found.encode(images)
        torch.testing.assert_close(mean, posterior.mean)
        torch.testing.assert_close(log_variance, posterior.logvar)
        z = 3 * torch.randn(2, 2, 4, 4)
        decoded = theirs.decode(z).sample
        torch.testing.assert_close(found.decode(z), decoded.clamp(-1, 1))
    assert mean.shape == (3, 2, 4, 4) and (found.channels, found.factor) == (2, 4)


def test_its_identity(kl):
    info = load_autoencoder(str(kl), CPU).info
    assert info == {
        "name": "autoencoder_kl",
        "path": str(kl),
        "revision": None,
        "weights_sha256": weights_sha256(load_file(kl / WEIGHTS)),
        "num_channels": 2,
        "layer": "posterior",
        "random": False,
        "factor": 4,
    }
    assert json.loads(json.dumps(info)) == info


def test_random_weights_say_so(tmp_path):
    found = load_autoencoder(str(write_kl(tmp_path / "kl", dinogen_random_weights=True)), CPU)
    assert found.info["random"] and "RANDOM" in found.label


def test_it_is_frozen_differentiable_and_takes_no_part_in_autocast(kl, images):
    found = load_autoencoder(str(kl), CPU).train()
    assert not found.training and not any(p.requires_grad for p in found.parameters())
    x = images.requires_grad_()
    plain = found.encode(x)[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(found.encode(x)[0], plain)
        assert found.decode(plain.bfloat16()).dtype == torch.float32
    found.decode(plain).sum().backward()
    assert x.grad.abs().sum() > 0


def test_ours_from_an_exported_file(tmp_path, images):
    file, G = write_ours(tmp_path / "vae.safetensors")
    found = load_autoencoder(str(file), CPU)
    with torch.no_grad():
        for one, other in zip(found.encode(images), G.encode(images), strict=True):
            assert torch.equal(one, other)
        z = torch.randn(2, 3, 4, 4)
        assert torch.equal(found.decode(z), G.decode(z))
    assert (found.channels, found.factor, found.info["name"]) == (3, 4, "vae")
    assert found.info["weights_sha256"] == weights_sha256(G.state_dict())
    assert found.label == "vae (vae.safetensors)"
    assert (found.resolution, found.info["resolution"]) == (16, 16)


def test_ours_from_a_published_folder(tmp_path):
    write_ours(tmp_path / "vae" / hub.WEIGHTS)
    assert load_autoencoder(str(tmp_path / "vae"), CPU).channels == 3


@pytest.mark.parametrize("kind", ["kl", "ours", "file"])
def test_addresses_of_the_hub(tmp_path, monkeypatch, kind):
    """The hub's client is replaced by a folder of the cache."""
    if kind == "kl":
        write_kl(tmp_path)
    else:
        write_ours(tmp_path / hub.WEIGHTS)
    below = f"/{hub.WEIGHTS}" if kind == "file" else ""
    path = tmp_path / hub.WEIGHTS if kind == "file" else tmp_path
    asked = []

    def fetch(address, files=None):
        asked.append(str(address))
        return hub.Fetched(path, "f" * 40)

    monkeypatch.setattr(hub, "fetch", fetch)
    found = load_autoencoder(f"hf://user/name{below}", CPU, "main")
    assert found.info["revision"] == "f" * 40
    assert set(asked) == {f"hf://user/name@main{below}"}


OF_OURS = {
    *("vector", "unknown file", "text file", "other family", "ours without weights"),
    *("no arguments", "text for arguments"),
}


def damaged(tmp_path, kind):
    """A path that is wrong in one way."""
    folder, file = tmp_path / "kl", tmp_path / "vae.safetensors"
    if kind == "no folder":
        return tmp_path / "gone" / "deep"
    if kind == "no file":
        return file
    if kind == "pipeline":
        folder.mkdir()
        (folder / "model_index.json").write_text("{}")
        return folder
    if kind in OF_OURS:
        write_ours(file, latent_side=0 if kind == "vector" else 4)
        if kind == "ours without weights":
            tensors = load_file(file)
            del tensors["to_rgb.bias"]
            with safe_open(file, "pt") as opened:
                save_file(tensors, file, opened.metadata())
        if kind == "unknown file":
            save_file({"x": torch.zeros(1)}, file)
        if kind == "text file":
            file.write_text("no weights")
        if kind in ("no arguments", "text for arguments"):
            network = {"class": "dinogen.networks.autoencoder.Autoencoder"}
            network |= {"arguments": "none"} if kind == "text for arguments" else {}
            told = {"family": "vae", "network": network}
            save_file(load_file(file), file, {EXPORTED_INFO: json.dumps(told)})
        if kind == "other family":
            told = {"family": "dcgan", "network": {"class": "x.Y", "arguments": {}}}
            save_file({"x": torch.zeros(1)}, file, {EXPORTED_INFO: json.dumps(told)})
        return file
    if kind == "run":
        (tmp_path / "run" / "16x16" / "checkpoints").mkdir(parents=True)
        (tmp_path / "run" / "config.yaml").write_text("{}")
        return tmp_path / "run"
    write_kl(folder)
    if kind == "no weights":
        (folder / WEIGHTS).unlink()
    if kind == "other weights":
        (folder / WEIGHTS).rename(folder / "model.fp16.safetensors")
    if kind == "cut short":
        (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100])
    if kind == "missing":
        tensors = load_file(folder / WEIGHTS)
        del tensors["decoder.conv_out.weight"]
        save_file(tensors, folder / WEIGHTS)
    if kind == "other shape":
        tensors = load_file(folder / WEIGHTS)
        tensors["quant_conv.weight"] = torch.zeros(7, 7, 1, 1)
        save_file(tensors, folder / WEIGHTS)
    if kind == "another class":
        settings = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(settings | {"_class_name": "VQModel"}))
    return folder


WRONG = {
    "no folder": "neither a folder nor a hub name such as stabilityai",
    "no file": "there is no file",
    "pipeline": "is a whole pipeline: give its autoencoder, .*/kl/vae",
    "vector": "of family vae, has a vector as its latent: .* family.latent_side",
    "unknown file": "was not written by `dinogen export`",
    "text file": "is damaged",
    "no arguments": "vae.safetensors was not written by `dinogen export`",
    "text for arguments": "vae.safetensors was not written by `dinogen export`",
    "other family": "of family dcgan, encodes no images",
    "ours without weights": "lacks 1 weights .to_rgb.bias",
    "run": "is a run: write its weights to a file with `dinogen export",
    "no weights": "lacks config.json or ..safetensors",
    "other weights": f"lacks {WEIGHTS}",
    "cut short": "is damaged .*: download the whole checkpoint again",
    "missing": "lacks 1 weights .decoder.conv_out.weight",
    "other shape": "is damaged",
    "another class": "of class VQModel, not AutoencoderKL",
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_cannot_be_loaded_is_one_line_with_the_key(tmp_path, kind):
    path = damaged(tmp_path, kind)
    with pytest.raises(GuideError, match=rf"^family\.latent\.path: .*{WRONG[kind]}") as failure:
        load_autoencoder(str(path), CPU, key="family.latent.path")
    assert "\n" not in str(failure.value)


def test_without_diffusers_the_extra_is_named(kl, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(GuideError, match=r"pip install 'dinogen\[latents\]'"):
        load_autoencoder(str(kl), CPU)


def test_it_is_what_its_class_says(tmp_path):
    _, G = write_ours(tmp_path / "vae.safetensors")
    assert isinstance(G, Autoencoder)
    assert isinstance(load_autoencoder(str(tmp_path / "vae.safetensors"), CPU), FrozenAutoencoder)
