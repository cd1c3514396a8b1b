"""A collapse is found in every family: made constant it is COLLAPSED, with real images it is ok."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from dinogen.families.registry import family_class, family_names
from dinogen.training.run import train
from tests.families.tiny import RESOLUTION, discs, pack_discs, tiny_config
from tests.training.helpers import stage

OWN = torch.from_numpy(np.stack(discs(24))).permute(0, 3, 1, 2) / 127.5 - 1


@pytest.fixture(scope="module")
def discs_on_disk(tmp_path_factory, guide_folder):
    folder = tmp_path_factory.mktemp("health")
    (folder / "guide").symlink_to(guide_folder)
    pack_discs(folder / "data")
    return folder / "data"


def trained(family, data, folder, images, monkeypatch):
    """result.json of a run of four steps whose samples are ``images``, in turn."""
    config = tiny_config(family, data, folder)
    cls = family_class(config.family)
    monkeypatch.setattr(cls, "sample", lambda *a, **k: images[a[2].cpu() % len(images)])
    (result,) = train(config)
    lines = (stage(config, RESOLUTION) / "stats.jsonl").read_text().splitlines()
    return result, json.loads(lines[-1])


WITHOUT_GUIDE = [name for name in family_names() if name != "guided"]


@pytest.mark.parametrize("family", WITHOUT_GUIDE)
def test_one_image_for_every_z_is_collapsed_and_the_data_themselves_are_ok(
    family, discs_on_disk, tmp_path, monkeypatch, caplog
):
    result, line = trained(family, discs_on_disk, tmp_path / "one", OWN[:1], monkeypatch)
    assert result["health"] == "COLLAPSED"
    assert line["diversity"] == pytest.approx(0, abs=1e-6)
    (warning,) = result["warnings"]
    assert warning.startswith("COLLAPSED: samples differ 0.0%") and "start again with" in warning
    assert warning in caplog.text
    result, line = trained(family, discs_on_disk, tmp_path / "all", OWN, monkeypatch)
    assert (result["health"], result["warnings"]) == ("ok", [])
    assert 0.5 < line["diversity"] < 2


def test_the_guided_family_too_in_the_features_of_its_guide(make_config, monkeypatch):
    real = []
    cls = family_class(make_config().family)

    def samples(family, networks, indices, seed, condition=None):
        size = family.stage.resolution
        drawn = torch.nn.functional.interpolate(OWN, (size, size), mode="area")
        return drawn[indices % (24 if real else 1)]

    monkeypatch.setattr(cls, "sample", samples)
    one = "stages=[{resolution: 4, kimg: 0.016, batch: 8, lr: 0.01}]"
    drift = "family.objectives=[{name: drift}]"
    for objective, remedy in ((), r"family.objectives=[{name: drift}]"), ((drift,), "batch"):
        (result,) = train(make_config(one, *objective, run=f"one{len(objective)}"))
        assert result["health"] == "COLLAPSED"
        assert remedy in result["warnings"][0].partition("start again with")[2]
    real.append(True)
    (result,) = train(make_config(one, drift, run="all"))
    assert result["health"] == "ok"
