"""A sample's members, keys and levels; what cannot be stored is refused by name."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from webdataset.tariterators import base_plus_ext

from shards import Sample
from shards.format.sample import decode, decode_npy, encode, level_name, npy_header, split_name

from .conftest import jpeg, make_samples


def test_members_survive_the_round_trip():
    for sample in make_samples(3, png_every=2):
        members = encode(sample)
        assert set(members) == {
            sample.image_format, "json", "p4.npy", "p8.npy", "p16.npy",
        }  # fmt: skip
        back = decode(sample.key, members)
        assert (back.key, back.image, back.image_format) == (
            sample.key, sample.image, sample.image_format,
        )  # fmt: skip
        assert (back.meta, back.label) == (sample.meta, sample.label)
        for name, values in sample.levels.items():
            np.testing.assert_array_equal(back.levels[name], values)


def test_json_is_the_same_in_any_order_of_its_keys():
    one = Sample("a", b"", "png", {"x": 1, "y": {"b": 1, "a": 2}})
    two = Sample("a", b"", "png", {"y": {"a": 2, "b": 1}, "x": 1})
    assert encode(one)["json"] == encode(two)["json"]
    assert json.loads(encode(one)["json"]) == one.meta


@pytest.mark.parametrize("places, channels", [(16, 6), (256, 768), (1024, 1536)])
def test_payload_lies_aligned_behind_128_bytes(places: int, channels: int):
    grid = int(places**0.5)
    sample = Sample("a", b"", "png", {}, {f"p{grid}": np.ones((places, channels), np.float16)})
    data = encode(sample)[f"p{grid}.npy"]
    shape, dtype, fortran, header = npy_header(data, "a")
    assert (shape, dtype, fortran, header) == ((places, channels), np.float16, False, 128)
    assert len(data) == 128 + places * channels * 2


@pytest.mark.parametrize("key", ["", "a.b", "a/b.c", "__x__/a", "a/../.b"])
def test_keys_that_webdataset_would_split_are_refused(key: str):
    with pytest.raises(ValueError, match="key"):
        Sample(key, b"", "jpg")


@pytest.mark.parametrize("key", ["Zoë 1", "./a", "v1.5/a", "a\\b", "__x", "ä" * 400, "x/\udce4"])
def test_every_key_that_webdataset_reads_is_fine(key: str):
    assert Sample(key, b"", "jpg").key == key
    assert base_plus_ext(f"{key}.p4.npy") == split_name(f"{key}.p4.npy") == (key, "p4.npy")


def test_names_are_split_as_webdataset_does():
    rng = np.random.default_rng(0)
    for _ in range(3000):
        name = "".join(rng.choice(list("aB._/-\n ä"), size=rng.integers(0, 12)))
        key, suffix = base_plus_ext(name)
        wanted = None if key is None or re.match(r"__[^/]*__($|/)", name) else (key, suffix.lower())
        assert split_name(name) == wanted, name


@pytest.mark.parametrize("value", [np.nan, np.inf, 70000.0])
def test_features_that_float16_cannot_hold_name_key_and_level(value: float):
    features = np.zeros((16, 4), np.float32)
    features[3, 2] = value
    with pytest.raises(ValueError, match=r"odd.*p4.*65504"):
        encode(Sample("odd", b"", "jpg", {}, {"p4": features}))


def test_level_of_the_wrong_shape_is_refused():
    with pytest.raises(ValueError, match=r"k: level p4 has shape \(17, 3\), expected \(16, C\)"):
        Sample("k", b"", "jpg", {}, {"p4": np.zeros((17, 3), np.float16)})


def test_level_names():
    assert [level_name(x) for x in (4, "p8", "n16")] == ["p4", "p8", "n16"]
    for wrong in ("x4", "p0", "p", "p4.npy", "4"):
        with pytest.raises(ValueError, match="is not the name of a level"):
            level_name(wrong)


@pytest.mark.parametrize("meta", [{"label": 3}, {"x": float("nan")}, {"x": object()}])
def test_meta_that_json_cannot_hold_is_refused(meta: dict):
    with pytest.raises(ValueError, match="k: "):
        encode(Sample("k", b"", "jpg", meta))


def test_pickled_arrays_are_never_loaded(tmp_path):
    path = tmp_path / "x.npy"
    np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="holds object, expected numbers"):
        decode_npy(path.read_bytes(), "x.npy")


def test_a_sample_without_image_is_refused():
    with pytest.raises(ValueError, match="k: has no image"):
        decode("k", {"json": b"{}"})
    assert decode("k", {"jpeg": jpeg(0), "json": b"{}"}).image_format == "jpg"
