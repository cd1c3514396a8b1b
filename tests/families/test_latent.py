"""Latents in place of images: drawn, normalised, decoded; and what is refused."""

from __future__ import annotations

import shutil
from fractions import Fraction

import numpy as np
import pytest
import torch

from dinogen.config import ConfigError, parse_config
from dinogen.distributed import rng
from dinogen.errors import UserError
from dinogen.families.latent import LatentOptions, Latents
from dinogen.features.base import GuideError
from dinogen.networks.denoising import LatentScale
from dinogen.training.preflight import check_run
from shards import open_dataset
from shards.read.mixture import MixedDataset
from tests.families.stored_latents import CHANNELS, SIDE, pack_latents
from tests.families.tiny import LATENT, pack_discs, tiny_config

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("latents")
    pack_latents(folder, flips=True)
    return folder


def latents_of(options=None, resolution=16, **sections):
    config = parse_config(
        {"family": {"name": "flow"}, "stages": [{"resolution": resolution, "kimg": 1}], **sections}
    )
    return Latents(LatentOptions(**LATENT | (options or {})), config, config.stages[0], CPU)


def begun(place, options=None, **sections):
    """Latents whose data are opened, with the scale of a network."""
    latents, scale = latents_of(options, **sections), LatentScale(CHANNELS)
    latents.begin(open_dataset(place / "data"), scale)
    return latents, scale


def whole(place, latents):
    """All of train as one batch."""
    data = open_dataset(place / "data")
    return data.read(range(data.num_samples()), levels=latents.levels)


def test_a_latent_is_mean_and_noise_of_the_posterior_that_is_stored(place):
    latents, scale = begun(place)
    batch = whole(place, latents)
    stored = batch["guides"]["latents"][SIDE].double()
    expected = torch.empty(len(stored), CHANNELS, SIDE, SIDE, dtype=torch.float64)
    eps = rng.normal(0, "latent", batch["position"], (CHANNELS, SIDE, SIDE)).double()
    for n in range(len(stored)):
        for c in range(CHANNELS):
            for y in range(SIDE):
                for x in range(SIDE):
                    mean = stored[n, y * SIDE + x, c]
                    deviation = torch.exp(stored[n, y * SIDE + x, CHANNELS + c] / 2)
                    z = mean + deviation * eps[n, c, y, x]
                    expected[n, c, y, x] = (z - scale.mean[c]) / scale.deviation[c]
    torch.testing.assert_close(latents.drawn(batch, scale).double(), expected, rtol=1e-5, atol=1e-5)
    assert not torch.equal(latents.drawn(batch, scale), latents.drawn(batch, scale, "/held-out"))


@pytest.mark.parametrize("sample", ["posterior", "mean"])
def test_over_the_data_they_have_mean_0_and_deviation_1(place, sample):
    latents, scale = begun(place, {"sample": sample})
    batch = whole(place, latents)
    num = 200 if sample == "posterior" else 1
    many = []
    for turn in range(num):
        batch["position"] = torch.arange(len(batch["key"])) + turn * len(batch["key"])
        many.append(latents.drawn(batch, scale))
    z = torch.cat(many).double()
    assert z.mean((0, 2, 3)).abs().max() < 0.01
    torch.testing.assert_close(
        z.var((0, 2, 3), correction=0), torch.ones(CHANNELS).double(), rtol=0.015, atol=0
    )


def test_of_a_mix_each_dataset_counts_by_its_weight(place, tmp_path):
    """Against one dataset whose samples are repeated as often as the weights say."""
    one = open_dataset(place / "data")
    pack_latents(tmp_path, val_fraction=0.8, shard_size=4)
    other = open_dataset(tmp_path / "data")
    mix = MixedDataset([one, other], [Fraction(1, 4), Fraction(3, 4)])
    parts = []
    for data, share in ((one, 0.25), (other, 0.75)):
        values = data.read(range(data.num_samples()), levels=["latents.n4"])
        values = values["guides"]["latents"][SIDE].double()
        weight = torch.full((len(values), SIDE**2), share / len(values) / SIDE**2)
        parts.append((values.flatten(0, 1), weight.flatten()))
    values, weight = (torch.cat(part) for part in zip(*parts, strict=True))
    z, log_variance = values.split(CHANNELS, 1)
    mean = (weight[:, None] * z).sum(0)
    variance = (weight[:, None] * ((z - mean) ** 2 + log_variance.exp())).sum(0)
    scale = LatentScale(CHANNELS)
    latents_of().begin(mix, scale)
    torch.testing.assert_close(scale.mean.double(), mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(scale.deviation.double(), variance.sqrt(), rtol=1e-4, atol=1e-5)


def test_a_mirrored_image_has_the_latent_of_its_mirror_image(place):
    latents, scale = begun(place, {"sample": "mean"}, augment={"flip": 0.5})
    batch = whole(place, latents)
    batch["flipped"] = torch.arange(len(batch["key"])) % 3 == 0
    images = open_dataset(place / "data").read(range(len(batch["key"])), image_size=16)["image"]
    images = torch.where(batch["flipped"][:, None, None, None], images.flip(3), images)
    expected = latents.encoded(images, scale)
    torch.testing.assert_close(latents.drawn(batch, scale), expected, rtol=1e-2, atol=2e-2)
    assert (latents.drawn(batch, scale) - latents.encoded(images.flip(3), scale)).abs().max() > 0.1


def test_they_are_decoded_and_encoded_in_parts(place, monkeypatch):
    latents, scale = begun(place)
    x = torch.randn(5, CHANNELS, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    z = x * scale.deviation[:, None, None] + scale.mean[:, None, None]
    expected = latents.autoencoder.decode(z)
    seen = []
    decode = latents.autoencoder.decode
    monkeypatch.setattr(
        latents.autoencoder, "decode", lambda z: (seen.append(len(z)), decode(z))[1]
    )
    monkeypatch.setattr("dinogen.families.latent._PIXELS_AT_ONCE", 2 * 16**2)
    images = latents.decoded(x.requires_grad_(), scale)
    assert seen == [2, 2, 1] and not images.requires_grad
    torch.testing.assert_close(images, expected)
    encoded = latents.encoded(images, scale)
    mean, _ = latents.autoencoder.encode(images)
    torch.testing.assert_close(encoded, scale.normalized(mean), rtol=1e-4, atol=1e-4)


def test_256_pixels_are_decoded_four_at_a_time():
    latents = latents_of({"factor": 8, "channels": 4}, resolution=256)
    assert latents.shape == (4, 32, 32) and latents.levels == ("latents.n32",)
    assert latents._at_once == 4


@pytest.mark.parametrize(
    ("options", "resolution", "sections", "message"),
    [
        ({"channels": 4}, 16, {}, r"set family.latent.channels=3 and family.latent.factor=4"),
        ({"factor": 8}, 16, {}, r"3 channels at 4x4.*set family.latent.channels=3 and .*factor=4"),
        ({"factor": 2}, 8, {}, r"stages: stage 8 reads latents of 8x8 images.*one stage of 16"),
        ({}, 32, {}, r"stages: stage 32 reads latents of 32x32 images.*train one stage of 16"),
        ({"path": "nowhere.safetensors"}, 16, {}, r"family.latent.path: there is no file nowhere"),
    ],
)
def test_what_does_not_fit_the_data_is_refused(place, options, resolution, sections, message):
    latents, data = latents_of(options, resolution, **sections), open_dataset(place / "data")
    with pytest.raises((ConfigError, GuideError), match=message):
        latents.check_data(data)
        latents.begin(data, LatentScale(CHANNELS))


def test_a_resolution_that_the_factor_does_not_divide_is_refused():
    with pytest.raises(ConfigError, match=r"family.latent.factor: images of 16x16 cannot be"):
        latents_of({"factor": 3})


def test_of_data_that_do_not_say_their_size_no_factor_of_0_is_advised(tmp_path):
    pack_discs(tmp_path / "data", [{"latents.n8": np.ones((64, 2 * CHANNELS), np.float16)}] * 24)
    data = open_dataset(tmp_path / "data")
    data.manifest = data.manifest.model_copy(update={"image_size": None})
    with pytest.raises(ConfigError, match=r"stages: stage 4 cannot read the latents.*set it to"):
        latents_of({"factor": 2}, 4).check_data(data)


@pytest.mark.parametrize(("name", "wrong", "right"), [("factor", 2, 4), ("channels", 4, 3)])
def test_an_autoencoder_of_other_sizes_than_the_options_say_is_refused(place, name, wrong, right):
    latents = latents_of({name: wrong, "path": str(place / "vae.safetensors")})
    message = rf"family.latent.{name}: {wrong}, but .*vae.safetensors is {right}: set it to {right}"
    with pytest.raises(ConfigError, match=message):
        _ = latents.autoencoder


def test_data_without_latents_or_without_mirrored_ones_are_refused(tmp_path):
    pack_discs(tmp_path / "images")
    with pytest.raises(ConfigError, match=r"holds no latents.*prepare.latents.path=AUTOENCODER"):
        latents_of().check_data(open_dataset(tmp_path / "images"))
    pack_latents(tmp_path)
    with pytest.raises(ConfigError, match=r"augment.flip: .*prepare.latents.flips=true"):
        latents_of(augment={"flip": 0.5}).check_data(open_dataset(tmp_path / "data"))
    config = tiny_config("flow-latent", tmp_path / "data", tmp_path / "run", "augment.flip=0.5")
    with pytest.raises(ConfigError, match=r"augment.flip: .*prepare.latents.flips=true"):
        check_run(config, [0], open_dataset(tmp_path / "data"))


def test_another_autoencoder_than_the_data_were_made_by_is_refused(tmp_path):
    info = pack_latents(tmp_path / "other").info
    pack_latents(tmp_path / "own", info=info | {"weights_sha256": "0" * 64})
    latents = latents_of({"path": str(tmp_path / "own" / "vae.safetensors")})
    with pytest.raises(ConfigError, match=r"family.latent.path: .* is not the autoencoder that"):
        latents.begin(open_dataset(tmp_path / "own" / "data"), LatentScale(CHANNELS))


def test_latents_that_are_all_the_same_are_refused(tmp_path, monkeypatch):
    def constant(autoencoder, pixels):
        level = np.zeros((SIDE**2, 2 * CHANNELS), np.float16)
        level[:, CHANNELS:] = -60000
        return {"latents.n4": level}

    monkeypatch.setattr("tests.families.stored_latents.posteriors", constant)
    pack_latents(tmp_path)
    with pytest.raises(ConfigError, match="are all the same"):
        begun(tmp_path)


def test_the_autoencoder_is_found_by_the_facts_and_beside_the_file(place, tmp_path):
    trained, _ = begun(place)
    facts = trained.describe()
    assert facts["frozen"] == {"family.latent.path": facts["autoencoder"]["weights_sha256"]}
    later = latents_of()
    with pytest.raises(UserError, match="neither the config nor the checkpoint names"):
        _ = later.autoencoder
    later.recall(facts, tmp_path)
    assert later.autoencoder is later.autoencoder
    moved = facts | {"autoencoder": facts["autoencoder"] | {"path": "gone/vae.safetensors"}}
    lost = latents_of()
    lost.recall(moved, tmp_path)
    with pytest.raises(GuideError, match=rf"put it, or a link to it, at {tmp_path}/vae.safetenso"):
        _ = lost.autoencoder
    shutil.copy(place / "vae.safetensors", tmp_path / "vae.safetensors")
    found = lost.autoencoder
    assert found.info["weights_sha256"] == facts["autoencoder"]["weights_sha256"]
