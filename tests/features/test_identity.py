"""When two guides are one: by network, weights and layer, wherever they were loaded from."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dinogen.features import GuideInfo, same_guide

INFO = GuideInfo("dinov2", "facebook/dinov2-small", "abc", "0" * 64, 384, 12, False)


def test_a_copy_from_elsewhere_is_the_same_guide():
    copied = replace(INFO, path="/data/dinov2", revision=None)
    assert same_guide(INFO.to_dict(), copied)


@pytest.mark.parametrize(
    "change", [{"name": "inception"}, {"weights_sha256": "1" * 64}, {"layer": 11}], ids=str
)
def test_another_network_other_weights_or_another_layer_are_another_guide(change):
    assert not same_guide({**INFO.to_dict(), **change}, INFO)


def test_who_says_nothing_is_not_the_same():
    assert not same_guide({}, INFO)
