"""docs/new-guide.md: its file, examples/edges.py, guides; and what is wrong with others."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from dinogen.config import ConfigError, GuideConfig, parse_config
from dinogen.config.guides import default_path, known_guides
from dinogen.features import Guide, GuideError, load_guide, native_pyramid
from dinogen.features.load import layer_channels

EXAMPLE = Path(__file__).parents[2] / "examples" / "edges.py"
SCHEMA = Path(__file__).parents[2] / "configs" / "schema.json"


def test_the_page_s_guide_measures_changes_of_brightness():
    config = GuideConfig(file=str(EXAMPLE))
    guide = load_guide(config)
    assert isinstance(guide, Guide) and config.name == guide.info.name == "edges"
    assert layer_channels(config) == (3,)
    ramp = torch.linspace(-1, 1, 16).expand(1, 3, 16, 16)
    features = guide(ramp)
    assert features.shape == (1, 3, 4, 4) and guide.input_size(4) == 16
    step = 2 / 15
    expected = np.full((4, 4), step)
    expected[:, [0, -1]] -= step / 8  # one of four columns has a neighbour on one side alone
    np.testing.assert_allclose(features[0, 0], expected, atol=1e-6)
    np.testing.assert_allclose(features[0, 1], 0, atol=1e-6)
    np.testing.assert_allclose(features[0, 2], expected, atol=1e-3)
    images = torch.rand(2, 3, 16, 16, requires_grad=True)
    level = native_pyramid(guide, images, (8,))[8]
    (gradient,) = torch.autograd.grad(level.square().sum(), images)
    assert gradient.abs().max() > 0
    with pytest.raises(GuideError, match=r"guide\.layer: 3: edges have no layers"):
        load_guide(GuideConfig(file=str(EXAMPLE), layer=3))


def test_its_own_default_path_is_read_without_running_it(tmp_path):
    file = tmp_path / "far.py"
    file.write_text("raise RuntimeError('ran')\nDEFAULT_PATH: str = 'someone/far-away'\n")
    config = parse_config({"guide": {"file": str(file)}, "guides": {"b": {"file": str(file)}}})
    assert config.guide.path == config.guides["b"].path == "someone/far-away"
    assert config.guide.name == "far"
    assert parse_config(config.model_dump(mode="json")) == config
    with pytest.raises(ConfigError, match=r"guide\.file: .*far\.py cannot be imported: .*ran"):
        load_guide(config.guide)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"name": "dino"}, r"guide: name: there is no guide 'dino': use .*'dinov2', 'dinov3'"),
        ({"name": "clip"}, r"there is no guide 'clip'"),
        ({"name": "dinov2", "file": "edges.py"}, r"name dinov2 and file edges\.py contradict"),
        ({"name": 3}, r"guide\.name: Input should be a valid string"),
    ],
)
def test_names_that_are_no_guides_are_refused_with_the_config(given, message):
    with pytest.raises(ConfigError, match=message):
        parse_config({"guide": given})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"guide\.file: .*mine\.py is not a Python file: name one that defines a guide"),
        ("x = (", r"guide\.file: .*mine\.py cannot be imported: SyntaxError"),
        ("x = 1", r"guide\.file: .*mine\.py has no DEFAULT_PATH: docs/new-guide\.md"),
        ("DEFAULT_PATH = None", r"guide\.file: .*mine\.py has no load: docs/new-guide\.md"),
        (
            "DEFAULT_PATH = 'a'.upper()\nload = layer_channels = print",
            r"guide\.file: .*mine\.py: DEFAULT_PATH has to be None or a text that is written out",
        ),
    ],
)
def test_files_that_are_no_guides_are_refused_when_they_are_loaded(tmp_path, text, message):
    file = tmp_path / "mine.py"
    if text is not None:
        file.write_text(text)
    config = GuideConfig(file=str(file))
    for act in (load_guide, layer_channels):
        with pytest.raises(ConfigError, match=message):
            act(config)


def test_the_file_may_move_and_the_guide_stays(tmp_path):
    shutil.copyfile(EXAMPLE, tmp_path / "edges.py")
    here, there = (load_guide(GuideConfig(file=str(f))) for f in (EXAMPLE, tmp_path / "edges.py"))
    assert here.info == there.info


def test_every_guide_of_dinogen_has_its_parts():
    assert list(known_guides()) == sorted(known_guides())
    assert {"dinov2", "dinov3", "inception", "onet", "pixels", "siglip", "timm", "vit"} == set(
        known_guides()
    )
    for name in known_guides():
        module = __import__(f"dinogen.features.{name}", fromlist=["load"])
        assert module.DEFAULT_PATH == known_guides()[name] == default_path(name, None)
        assert callable(module.load) and callable(module.layer_channels)
        assert f'"{name}"' in SCHEMA.read_text()
