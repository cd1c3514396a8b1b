"""Real images are read once, and the cache never returns those of other images."""

from __future__ import annotations

import json

import pytest
import torch

from dinogen.metrics.collect import collect, seen_of_reference
from dinogen.metrics.sources import Images
from tests.metrics.small import Means, small_data


@pytest.fixture
def data(tmp_path):
    return small_data(tmp_path / "data")


def val(data, num=8, resolution=16):
    return Images(data, "val", range(num), resolution)


def ask(source, extractor, cache, keep=()):
    return seen_of_reference(source, [extractor], keep, 3, cache)[extractor.info.name]


def test_it_is_what_is_collected_and_worked_out_once(data, tmp_path):
    expected = collect(val(data), [Means()], {"inception768"}, 3).seen["inception768"]
    for turn in range(2):
        extractor = Means()
        seen = ask(val(data), extractor, tmp_path / "cache", {"inception768"})
        assert extractor.num_seen == (0 if turn else 8)
        assert torch.equal(seen.features, expected.features)
        assert torch.equal(seen.moments.covariance(), expected.moments.covariance())
        assert seen.info == extractor.info and seen.moments.count == 8
    (told,) = (tmp_path / "cache").glob("*.json")
    assert json.loads(told.read_text())["num_reference"] == 8
    assert sorted(p.suffix for p in (tmp_path / "cache").iterdir()) == [".json", ".safetensors"]


@pytest.mark.parametrize(
    "other",
    [
        lambda data: (val(data, num=7), Means()),
        lambda data: (val(data, resolution=8), Means()),
        lambda data: (Images(data, "test", range(6), 16), Means()),
        lambda data: (val(data), Means(resize="nearest 4")),
        lambda data: (val(data), Means(weights="b" * 64)),
        lambda data: (val(data), Means("dinov2")),
    ],
    ids=["count", "resolution", "split", "filter", "weights", "judge"],
)
def test_anything_else_is_worked_out_for_itself(data, tmp_path, other):
    ask(val(data), Means(), tmp_path / "cache")
    source, extractor = other(data)
    assert ask(source, extractor, tmp_path / "cache").moments.count == source.num
    assert extractor.num_seen == source.num


def test_of_two_extractors_only_the_new_one_reads_the_images(data, tmp_path):
    ask(val(data), Means(), tmp_path / "cache")
    old, new = Means(), Means("dinov2")
    found = seen_of_reference(val(data), [old, new], (), 3, tmp_path / "cache")
    assert (old.num_seen, new.num_seen) == (0, 8)
    assert list(found) == ["inception768", "dinov2"]
    assert torch.equal(found["dinov2"].moments.total, found["inception768"].moments.total)


def test_rows_that_were_not_kept_are_worked_out_when_they_are_asked_for(data, tmp_path):
    cache = tmp_path / "cache"
    assert ask(val(data), Means(), cache).features is None
    extractor = Means()
    assert ask(val(data), extractor, cache, {"inception768"}).features.shape == (8, 6)
    assert extractor.num_seen == 8
    extractor = Means()
    assert ask(val(data), extractor, cache).features is None and extractor.num_seen == 0
    assert ask(val(data), extractor, cache, {"inception768"}).features is not None
    assert extractor.num_seen == 0


def cut_off(path, good):
    path.write_bytes(good[: len(good) // 2])


def one_bit(path, good):
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))


def of_others(path, good):
    path.write_bytes(good.replace(b"val", b"vax"))


@pytest.mark.parametrize("damage", [cut_off, one_bit, of_others])
def test_a_damaged_cache_is_computed_again(damage, data, tmp_path, caplog):
    cache = tmp_path / "cache"
    expected = ask(val(data), Means(), cache)
    (path,) = cache.glob("*.safetensors")
    good = path.read_bytes()
    damage(path, good)
    extractor = Means()
    seen = ask(val(data), extractor, cache)
    assert extractor.num_seen == 8 and "is computed again" in caplog.text
    assert torch.equal(seen.moments.total, expected.moments.total)
    extractor = Means()
    ask(val(data), extractor, cache)
    assert extractor.num_seen == 0, "and is whole again"


def test_a_cache_that_cannot_be_written_costs_no_value(data, tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    seen = ask(val(data), Means(), tmp_path / "file" / "cache")
    assert seen.moments.count == 8
    assert "set metrics.cache to another folder" in caplog.text
