"""Fingerprints: the same for the same measurement anywhere, different if anything else is."""

from __future__ import annotations

import shutil
from fractions import Fraction

import pytest

from dinogen.metrics.extractors.base import ExtractorInfo
from dinogen.metrics.sources import data_sha256, files_sha256
from dinogen.metrics.value import fingerprint
from dinogen.runs.fingerprint import alike_facts, alike_id, differences, fingerprint_id
from shards.read.dataset import open_dataset
from shards.read.mixture import MixedDataset
from tests.families.tiny import discs
from tests.metrics.small import pack_images, small_data

EXTRACTOR = {
    "name": "inception",
    "weights_sha256": "a" * 64,
    "resize": "bilinear antialias 299",
    "num_channels": 2048,
    "num_logits": 1008,
    "random": False,
}
REFERENCE = {"data": "d" * 64, "split": "val", "resize": "box to 64"}


def made(extractor=None, reference=None, resolution=64, num_samples=5000, num_reference=700):
    info = ExtractorInfo(**(EXTRACTOR | (extractor or {})))
    facts = REFERENCE | (reference or {})
    return fingerprint(info, resolution, num_samples, facts, num_reference)


def test_it_is_twelve_digits_and_does_not_change_from_version_to_version():
    """Metric values of years ago have to stay comparable."""
    # printf '{"a":"x","b":1}' | sha256sum
    assert fingerprint_id({"b": 1, "a": "x"}) == "cdab067e9f3b"
    assert set(made()) == {
        "data",
        "split",
        "num_reference",
        "num_samples",
        "resolution",
        "resize",
        "judge",
        "weights_sha256",
        "random",
    }


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"extractor": {"resize": "nearest 299"}},
            "resize: box to 64, then nearest 299, not box to 64, then bilinear antialias 299",
        ),
        (
            {"reference": {"resize": "nearest to 64"}},
            "resize: nearest to 64, then bilinear antialias 299, not box to 64, then bilinear "
            "antialias 299",
        ),
        ({"reference": {"split": "train"}}, "split: train, not val"),
        ({"reference": {"data": "e" * 64}}, "data: eeeeeeeeeeee, not dddddddddddd"),
        ({"num_samples": 500}, "num_samples: 500, not 5000"),
        ({"num_reference": 70}, "num_reference: 70, not 700"),
        ({"resolution": 32}, "resolution: 32, not 64"),
        (
            {"extractor": {"weights_sha256": "b" * 64}},
            "weights_sha256: bbbbbbbbbbbb, not aaaaaaaaaaaa",
        ),
        ({"extractor": {"name": "inception768"}}, "judge: inception768, not inception"),
        ({"extractor": {"random": True}}, "random: True, not False"),
    ],
)
def test_each_thing_that_moves_a_value_is_said(change, words):
    assert differences(made(**change), made()) == [words]
    assert fingerprint_id(made(**change)) != fingerprint_id(made())


@pytest.mark.parametrize(
    ("sampling", "same"),
    [
        ({"noise": "per image"}, True),
        ({"classes": [0.25, 0.75]}, True),
        ({"noise": "per image", "classes": [0.25, 0.75]}, True),
        ({"classes": "in turn"}, False),
        ({"noise": "per image", "classes": "in turn"}, False),
        ({"truncation": 0.5}, False),  # of a family of somebody else
        ({"noise": "per image", "truncation": 0.5}, False),
        ({"noise": "constant"}, False),
        ("anything", False),
    ],
)
def test_draws_of_a_models_own_do_not_keep_values_from_being_compared(sampling, same):
    """StyleGAN2 and a flow of the same data stand in one column; in-turn classes do not."""
    known = {fingerprint_id(one): one for one in (made(), made() | {"sampling": sampling})}
    plain, drawn = known
    assert plain != drawn
    assert (alike_id(drawn, known) == plain) is same
    assert alike_id(plain, known) == plain
    # what was measured otherwise stays apart
    small = made(num_samples=50) | {"sampling": sampling}
    assert alike_id(fingerprint_id(small), {fingerprint_id(small): small}) != plain
    # nothing is known of it, or it has none
    assert (alike_id(drawn, {}), alike_id(None, known)) == (drawn, None)


def test_classes_in_turn_are_alike_whatever_noise_there_is():
    one, other = ({"classes": "in turn"}, {"classes": "in turn", "noise": "per image"})
    assert alike_facts(made() | {"sampling": one}) == alike_facts(made() | {"sampling": other})


def test_a_metric_that_compares_with_nothing():
    info = ExtractorInfo(**EXTRACTOR)
    facts = fingerprint(info, 64, 100)
    assert (facts["data"], facts["split"], facts["num_reference"]) == (None, None, None)
    assert differences(facts, facts) == []


def test_data_are_known_by_what_they_hold(tmp_path):
    data = small_data(tmp_path / "here")
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    mark = data_sha256(data)
    assert data_sha256(open_dataset(tmp_path / "there")) == mark
    # shrunk by another filter: nearest in place of area
    by_nearest = [image[::2, ::2].copy() for image in discs(48, 32)]
    by_area = [
        image.reshape(16, 2, 16, 2, 3).mean((1, 3)).astype("uint8") for image in discs(48, 32)
    ]
    marks = [
        data_sha256(pack_images(tmp_path / name, images))
        for name, images in [("nearest", by_nearest), ("area", by_area)]
    ]
    assert len(set(marks)) == 2 and marks[1] != mark
    other = open_dataset(tmp_path / "area")
    mixes = [
        data_sha256(MixedDataset([data, other], [Fraction(weight), Fraction(1)]))
        for weight in (1, 2)
    ]
    assert len({mark, *mixes}) == 3


def test_files_are_known_by_what_they_hold_in_their_order(tmp_path):
    for name, text in [("a", "1"), ("b", "2"), ("c", "1"), ("d", "2")]:
        (tmp_path / name).write_text(text)
    a, b, c, d = (tmp_path / name for name in "abcd")
    assert files_sha256([a, b]) == files_sha256([c, d]) != files_sha256([b, a])
    assert files_sha256([a]) != files_sha256([a, b])
