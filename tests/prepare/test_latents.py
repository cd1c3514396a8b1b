"""Latents of an autoencoder: in one pass, in steps, interrupted, found again, refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import yaml

from dinogen.config import ConfigError, LatentsConfig, parse_config
from dinogen.features.autoencoder import load_autoencoder
from dinogen.prepare import join, pipeline
from dinogen.prepare.faces.folder import write_faces
from dinogen.prepare.latents import LatentMaker
from dinogen.prepare.parts import write_pyramids
from dinogen.prepare.photos.read import PrepareError
from dinogen.training.data import check_latents, makes_features, makes_pyramids
from shards import open_dataset
from shards.check.repair import repair
from shards.check.verify import verify
from shards.errors import PackError
from shards.image.decode import decode_image
from tests.features.autoencoders import write_kl, write_ours
from tests.prepare.pipelines import dinogen
from tests.prepare.several_guides import CPU, all_samples, contents, fill, maker_of, settings

NOTHING = {"guide": None, "guides": {}, "embedder": None}


@pytest.fixture(scope="module")
def kl(tmp_path_factory):
    return write_kl(tmp_path_factory.mktemp("weights") / "kl")


def latents_of(path, **changes):
    return LatentMaker.load(LatentsConfig(path=str(path), **({"batch": 3} | changes)), CPU)


def with_all(kl, flips=True):
    """Features of both orientations, embeddings, and latents."""
    config = settings(pyramids={"flips": flips})
    return config, maker_of(config=config.pyramids, latents=latents_of(kl, flips=flips))


@pytest.fixture(scope="module")
def prepared(kl, tmp_path_factory):
    """Photos prepared with everything, in one pass."""
    folder = tmp_path_factory.mktemp("latents")
    pipeline.prepare(fill(folder / "photos"), folder / "data", *with_all(kl))
    return folder / "data"


def image_of(sample):
    pixels = torch.from_numpy(decode_image(sample.image, sample.image_format).copy())
    return (pixels.permute(2, 0, 1)[None].float() - 127.5) / 127.5


def stored_posterior(autoencoder, images):
    """(s * s, 2C), location by location."""
    with torch.no_grad():
        mean, log_variance = (one[0].double().numpy() for one in autoencoder.encode(images))
    _, height, width = mean.shape
    places = [(row, column) for row in range(height) for column in range(width)]
    return np.array([[*mean[:, r, c], *log_variance[:, r, c]] for r, c in places])


def test_stored_latents_are_those_of_the_stored_image(kl, prepared):
    autoencoder = load_autoencoder(str(kl), CPU)
    for sample in all_samples(prepared):
        image = image_of(sample)
        for name, shown in (("latents", image), ("latents_flipped", image.flip(3))):
            found = sample.levels[f"{name}.n8"]
            assert found.dtype == np.float16 and found.shape == (64, 4)
            expected = stored_posterior(autoencoder, shown)
            np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)


def test_ours_alone_without_any_guide(tmp_path):
    file, G = write_ours(tmp_path / "vae.safetensors", resolution=32, latent_side=8)
    maker = maker_of(**NOTHING, latents=latents_of(file))
    pipeline.prepare(fill(tmp_path / "photos"), tmp_path / "data", settings(), maker)
    for sample in all_samples(tmp_path / "data"):
        assert list(sample.levels) == ["latents.n8"]
        expected = stored_posterior(G, image_of(sample))
        np.testing.assert_allclose(sample.levels["latents.n8"], expected, rtol=1e-3, atol=1e-4)
    manifest = open_dataset(tmp_path / "data").manifest
    assert manifest.guide == {} and "pyramids" not in manifest.prepare
    assert manifest.guides == {"latents": load_autoencoder(str(file), CPU).info}
    assert verify(open_dataset(tmp_path / "data")) == []


def test_the_manifest_names_the_autoencoder(kl, prepared):
    manifest = open_dataset(prepared).manifest
    info = json.loads(json.dumps(load_autoencoder(str(kl), CPU).info))
    assert manifest.guides["latents"] == manifest.guides["latents_flipped"] == info
    assert (info["name"], info["factor"], info["num_channels"]) == ("autoencoder_kl", 4, 2)
    level = manifest.levels["latents.n8"]
    assert (level.grid, level.channels) == (8, 4) and level.total_variance > 0


def test_statistics_of_the_latents_are_those_of_the_training_images(prepared):
    data = open_dataset(prepared)
    samples = [data.sample(n, "train") for n in range(data.num_samples("train"))]
    values = np.stack([sample.levels["latents.n8"] for sample in samples]).astype(np.float64)
    np.testing.assert_allclose(data.level_variance("latents.n8"), values.var(0), rtol=1e-4)


@pytest.mark.parametrize("which", ["everything", "latents alone"])
def test_one_pass_gives_the_bytes_of_the_three_steps(kl, tmp_path, which):
    def made():
        _, maker = with_all(kl)
        return maker if which == "everything" else maker_of(**NOTHING, latents=maker.latents)

    config, _ = with_all(kl)
    photos = fill(tmp_path / "photos")
    faces, parts, data, once = (tmp_path / name for name in ("faces", "parts", "data", "once"))
    pipeline.prepare(photos, once, config, made())
    write_faces(photos, faces, config.faces, with_captions=which == "everything")
    write_pyramids(faces, parts, made())
    source = join.open_pyramids(parts)
    join.pack_faces(faces, source, data, config.pack, join.guide_of(source, None))
    assert contents(data) == contents(once)
    # all parts are there already
    assert write_pyramids(faces, parts, made()).num_done == 0


class Killed(BaseException):
    pass


@pytest.mark.parametrize("at", [3, 7])
def test_interrupted_and_resumed_gives_the_same_bytes(kl, prepared, tmp_path, at):
    def kill(done, total):
        if done > at:
            raise Killed

    photos, data = fill(tmp_path / "photos"), tmp_path / "data"
    with pytest.raises(Killed):
        pipeline.prepare(photos, data, *with_all(kl), progress=kill)
    with pytest.raises(PackError, match=r"unfinished packing with other settings \(guides\)"):
        config, maker = with_all(kl)
        maker.latents = None
        pipeline.prepare(photos, data, config, maker)
    pipeline.prepare(photos, data, *with_all(kl))
    assert contents(data) == contents(prepared)


def test_features_do_not_change_beside_latents(kl, prepared, tmp_path):
    config, maker = with_all(kl)
    maker.latents = None
    pipeline.prepare(fill(tmp_path / "photos"), tmp_path / "data", config, maker)
    for plain, both in zip(all_samples(tmp_path / "data"), all_samples(prepared), strict=True):
        assert all(np.array_equal(both.levels[n], found) for n, found in plain.levels.items())


def test_a_finished_dataset_is_found_again(kl, prepared, tmp_path):
    """With what is asked for and more it is taken; with other latents, or none, it is refused."""
    photos, before = prepared.parent / "photos", contents(prepared)
    config, maker = with_all(kl)
    pipeline.prepare(photos, prepared, config, maker)
    maker.latents = None
    pipeline.prepare(photos, prepared, config, maker)
    maker.latents = latents_of(kl, flips=False)
    pipeline.prepare(photos, prepared, config, maker)
    maker.latents = latents_of(write_kl(tmp_path / "other", seed=1))
    with pytest.raises(PrepareError, match=r"prepare\.latents\.path: autoencoder_kl .*/kl\)"):
        pipeline.prepare(photos, prepared, config, maker)
    assert contents(prepared) == before


def test_a_copied_autoencoder_is_the_same(prepared, tmp_path):
    config, maker = with_all(write_kl(tmp_path / "copy"))
    pipeline.prepare(prepared.parent / "photos", prepared, config, maker)


def test_what_a_finished_dataset_lacks_is_said(kl, tmp_path):
    photos, data = fill(tmp_path / "photos"), tmp_path / "data"
    plain, flipped = (maker_of(**NOTHING, latents=latents_of(kl, flips=f)) for f in (False, True))
    pipeline.prepare(photos, data, settings(), plain)
    with pytest.raises(PrepareError, match=r"prepare\.latents\.flips: false, now true"):
        pipeline.prepare(photos, data, settings(), flipped)


def test_parts_are_continued_and_those_of_others_refused(kl, tmp_path):
    photos, faces, parts = (tmp_path / name for name in ("photos", "faces", "parts"))
    config, maker = with_all(kl, flips=False)
    write_faces(fill(photos), faces, config.faces, with_captions=True)
    write_pyramids(faces, parts, maker)
    before = {path: path.read_bytes() for path in parts.iterdir()}
    (parts / "part-00001.safetensors").unlink()
    assert write_pyramids(faces, parts, maker).num_done == 1
    assert {path: path.read_bytes() for path in parts.iterdir()} == before
    maker.latents = latents_of(kl, flips=True)
    with pytest.raises(PrepareError, match=r"prepare\.latents\.flips: false, now true"):
        write_pyramids(faces, parts, maker)
    maker.latents = latents_of(write_kl(tmp_path / "other", seed=1))
    with pytest.raises(PrepareError, match=r"prepare\.latents\.path: autoencoder_kl"):
        write_pyramids(faces, parts, maker)
    maker.latents = None
    with pytest.raises(PrepareError, match=r"prepare\.latents\.path: .*, now none"):
        write_pyramids(faces, parts, maker)


def test_new_faces_alone_are_encoded(kl, tmp_path):
    photos, faces, parts = (tmp_path / name for name in ("photos", "faces", "parts"))
    write_faces(fill(photos), faces, settings().faces)
    gone = sorted(faces.glob("*.jpg"))[4]
    kept = {path: path.read_bytes() for path in (gone, gone.with_suffix(".json"))}
    for path in kept:
        path.unlink()
    write_pyramids(faces, parts, maker_of(**NOTHING, latents=latents_of(kl)))
    for path, data in kept.items():
        path.write_bytes(data)
    maker = maker_of(**NOTHING, latents=latents_of(kl, batch=1))
    encoded, encode = [], maker.latents.autoencoder.encode
    maker.latents.autoencoder.encode = lambda images: encoded.append(images) or encode(images)
    write_pyramids(faces, parts, maker)
    assert len(encoded) == 1
    assert join.open_pyramids(parts).keys() >= {gone.stem}


def test_the_batch_does_not_decide(kl, prepared, tmp_path):
    config, maker = with_all(kl)
    maker.latents = latents_of(kl, flips=True, batch=8)
    pipeline.prepare(fill(tmp_path / "photos"), tmp_path / "data", config, maker)
    for one, other in zip(all_samples(tmp_path / "data"), all_samples(prepared), strict=True):
        found, expected = (s.levels["latents.n8"].astype(np.float64) for s in (one, other))
        np.testing.assert_allclose(found, expected, rtol=2e-3, atol=1e-4)


def test_a_size_that_the_factor_does_not_divide_is_refused(kl, tmp_path):
    maker = maker_of(**NOTHING, latents=latents_of(kl))
    config = settings(faces={"size": 30})
    with pytest.raises(PrepareError, match=r"prepare\.faces\.size: 30 is not a multiple of 4"):
        pipeline.prepare(fill(tmp_path / "photos"), tmp_path / "data", config, maker)
    write_faces(tmp_path / "photos", tmp_path / "faces", config.faces)
    with pytest.raises(PrepareError, match=r"prepare\.faces\.size: 30 is not a multiple of 4"):
        write_pyramids(tmp_path / "faces", tmp_path / "parts", maker)


def test_another_size_than_it_was_trained_on_is_warned_of(tmp_path, caplog):
    file, _ = write_ours(tmp_path / "vae.safetensors", resolution=16)
    maker = maker_of(**NOTHING, latents=latents_of(file))
    pipeline.prepare(fill(tmp_path / "photos"), tmp_path / "data", settings(), maker)
    (line,) = [record.message for record in caplog.records if "trained on" in record.message]
    assert line.startswith("prepare.faces.size: 32, but the autoencoder vae (vae.safetensors)")
    assert list(open_dataset(tmp_path / "data").manifest.levels) == ["latents.n8"]


def test_latents_beyond_float16_name_the_autoencoder(kl, tmp_path):
    maker = maker_of(latents=latents_of(kl))
    encode = maker.latents.autoencoder.encode
    maker.latents.autoencoder.encode = lambda images: [1e6 * one for one in encode(images)]
    with pytest.raises(
        PrepareError,
        match=r"f00: level latents\.n8 is not finite .* latents of autoencoder_kl .* 65504; choose "
        r"another autoencoder \(prepare\.latents\.path\)",
    ):
        pipeline.prepare(fill(tmp_path / "photos"), tmp_path / "data", settings(), maker)


def test_repair_keeps_them(kl, prepared, tmp_path):
    data = tmp_path / "data"
    pipeline.prepare(fill(tmp_path / "photos"), data, *with_all(kl))
    (data / "manifest.json").unlink()
    repair(data)
    again, before = (open_dataset(folder).manifest for folder in (data, prepared))
    assert again.levels == before.levels and again.guides == before.guides


@pytest.mark.parametrize("name", ["latents", "latents_flipped"])
def test_their_names_are_not_free(name):
    with pytest.raises(ConfigError, match=f"'{name}' cannot be the name of a guide"):
        parse_config({"guides": {name: {"name": "pixels"}}})


def test_path_is_needed_and_unknown_keys_are_refused():
    with pytest.raises(ConfigError, match=r"prepare\.latents\.path"):
        parse_config({"prepare": {"latents": {"flips": True}}})
    with pytest.raises(ConfigError, match=r"flip"):
        parse_config({"prepare": {"latents": {"path": "x", "flip": True}}})


# --- from the command line

PLAIN = {
    "guide": {"path": "/nowhere"},
    "family": {"name": "dcgan", "ngf": 8, "ndf": 8},
    "prepare": {"faces": {"size": 32, "detect": "none"}},
    "stages": [{"resolution": 32, "kimg": 1}],
}
READER = """
from dinogen.families.base import Inputs
from dinogen.families.vae import Vae

class Reader(Vae):
    @property
    def inputs(self):
        flips = ("latents_flipped.n8",) if self.config.augment.flip else ()
        return Inputs(self.stage.resolution, ("latents.n8", *flips))
"""


def config_file(tmp_path, **changes):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({**PLAIN, **changes}))
    return path


def test_both_ways_as_they_are_typed(kl, tmp_path):
    photos, path = fill(tmp_path / "photos"), config_file(tmp_path)
    once, faces, parts, steps = (tmp_path / name for name in ("once", "faces", "parts", "steps"))
    asked = ("-c", path, f"prepare.latents.path={kl}")
    done = dinogen("prepare", photos, once, *asked)
    assert done.exit_code == 0, done.output
    assert "no pyramids: family dcgan reads none" in done.stdout
    assert "latents.n8: 4 channels" in done.stdout
    for words in (
        ("faces", photos, faces, "-c", path),
        ("pyramids", faces, parts, *asked),
        ("pack", faces, parts, steps, *asked),
    ):
        done = dinogen(*words)
        assert done.exit_code == 0, done.output
    assert contents(once) == contents(steps)
    assert dinogen("prepare", photos, once, *asked).stdout.count("already finished") == 1
    done = dinogen("pack", faces, tmp_path / "plain", *asked)
    assert "dinogen pyramids computes" in str(done.exception)
    done = dinogen("pack", faces, parts, tmp_path / "more", *asked, "prepare.latents.flips=true")
    assert "holds no latents_flipped.*, and the config has prepare.latents.flips" in str(
        done.exception
    )
    plain = ("guide.name=pixels", "prepare.pyramids.make=always")
    assert dinogen("pyramids", faces, tmp_path / "pixels", "-c", path, *plain).exit_code == 0
    done = dinogen("pack", faces, tmp_path / "pixels", tmp_path / "more", *asked)
    assert "holds no latents.*, and the config has prepare.latents:" in str(done.exception)


def test_whether_features_are_made():
    config = parse_config({**PLAIN, "prepare": {"latents": {"path": "x"}}})
    assert makes_features(config) and not makes_pyramids(config)
    assert not makes_features(parse_config(PLAIN))


def test_a_family_that_reads_latents_needs_no_guide_but_an_autoencoder(kl, tmp_path):
    (tmp_path / "reader.py").write_text(READER)
    path = config_file(tmp_path, family={"file": str(tmp_path / "reader.py")})
    photos = fill(tmp_path / "photos")
    done = dinogen("prepare", photos, tmp_path / "data", "-c", path)
    assert isinstance(done.exception, ConfigError)
    assert "prepare.latents: family reader reads latents (latents.n8): name the autoenc" in str(
        done.exception
    )
    asked = ("-c", path, f"prepare.latents.path={kl}")
    done = dinogen("prepare", photos, tmp_path / "data", *asked, "augment.flip=0.5")
    assert "prepare.latents.flips: family reader reads latents of mirrored" in str(done.exception)
    done = dinogen("prepare", photos, tmp_path / "data", *asked, "prepare.faces.size=64")
    assert (
        "prepare.latents.path: family reader reads latents.n8, and this autoencoder makes "
        in str(done.exception)
    )
    done = dinogen("prepare", photos, tmp_path / "data", *asked)
    assert done.exit_code == 0, done.output
    assert list(open_dataset(tmp_path / "data").manifest.levels) == ["latents.n8"]


def test_data_that_are_there_are_not_asked_for_an_autoencoder():
    check_latents(parse_config(PLAIN), ())
    check_latents(parse_config(PLAIN), ["latents.n8"])
