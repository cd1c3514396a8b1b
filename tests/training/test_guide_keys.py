"""Which keys of guides a run may change, and what data a family's levels ask for."""

from __future__ import annotations

import pytest

from dinogen.config import parse_config
from dinogen.families.base import Inputs
from dinogen.training import data
from dinogen.training.preflight import _compared, _leaves

BASE = {
    "guides": {"a": {"name": "inception", "path": "x", "layer": ["pool1"]}},
    "clip": {"path": "here"},
}


@pytest.mark.parametrize(
    ("change", "changed"),
    [
        ("guides.a.path=elsewhere", set()),
        ("guides.a.revision=abc", set()),
        ("clip.path=elsewhere", set()),
        ("guides.a.layer=[pool1, pool2]", {"guides.a.layer"}),
        ("guides.a.name=dinov2", {"guides.a.name"}),
        ("guides.b.name=pixels", {"guides.b.name", "guides.b.layer"}),
    ],
)
def test_where_a_network_lies_may_change_and_not_which_it_is(change, changed):
    before = parse_config(BASE)
    after = parse_config(before.model_dump(mode="json"), [change])
    old, new = (_leaves(_compared(one, before, 4)) for one in (before, after))
    assert {key for key in old | new if old.get(key) != new.get(key)} == changed


def test_a_config_that_knew_no_guides_is_compared_as_one_without():
    then = parse_config({}).model_dump(mode="json")
    del then["guides"], then["clip"], then["prepare"]["pyramids"]["base_grid"]
    now = parse_config({})
    assert _leaves(_compared(parse_config(then), now, 4)) == _leaves(_compared(now, now, 4))


@pytest.mark.parametrize(
    ("read", "clip", "pyramids", "features"),
    [
        ((), False, False, False),
        (("pixels.p8",), False, True, True),
        (("clip", "text"), True, False, True),
        (("n8", "clip"), True, True, True),
    ],
)
def test_embeddings_alone_need_no_guide(monkeypatch, read, clip, pyramids, features):
    class Reader:
        def __init__(self, config, stage, device):
            self.inputs = Inputs(image_size=None, levels=read)

    monkeypatch.setattr(data, "family_class", lambda family: Reader)
    config = parse_config({"clip": {"path": "here"}} if clip else {})
    assert data.makes_pyramids(config) == pyramids
    assert data.makes_features(config) == features
