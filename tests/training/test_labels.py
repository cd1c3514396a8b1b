"""Labels that are none of the family's classes, of shards whose manifest names no classes."""

from __future__ import annotations

import pytest

from dinogen.config import ConfigError
from dinogen.evaluation.evaluate import evaluate
from dinogen.training.run import train
from shards import open_dataset
from tests.families.tiny import pack_discs, tiny_config


@pytest.fixture(scope="module")
def unnamed(tmp_path_factory):
    """Discs with labels 0 and 1, which the manifest does not name."""
    folder = tmp_path_factory.mktemp("labels") / "data"
    pack_discs(folder)
    manifest = open_dataset(folder).manifest
    assert manifest.has_labels and not manifest.classes
    return folder


def config_of(data, tmp_path, num_classes, *more):
    return tiny_config("ddpm", data, tmp_path / "run", f"family.num_classes={num_classes}", *more)


def test_a_label_beyond_the_classes_is_refused_as_it_is_read(unnamed, tmp_path):
    said = rf"family\.num_classes: 1, but sample disc\d+ of {unnamed} has label 1: set it to 2 or"
    with pytest.raises(ConfigError, match=said):
        train(config_of(unnamed, tmp_path, 1))


def test_a_label_below_zero_is_refused(tmp_path, monkeypatch):
    pack_discs(tmp_path / "data")
    labels = type(open_dataset(tmp_path / "data").table("train")).labels
    monkeypatch.setattr("shards.format.table.SampleTable.labels", lambda *args: labels(*args) - 1)
    with pytest.raises(ConfigError, match="has label -1: labels begin at 0, or pack"):
        train(config_of(tmp_path / "data", tmp_path, 2))


def test_held_out_labels_are_looked_at_too(unnamed, tmp_path, monkeypatch):
    config = config_of(unnamed, tmp_path, 2)
    (result,) = train(config)
    assert result["status"] == "finished"
    monkeypatch.setattr(
        "shards.format.table.SampleTable.labels", lambda self, rows: [7 for _ in rows]
    )
    result = evaluate(config.run, num_samples=4)
    assert "has label 7: set it to 8 or more" in result["not_measured"]["held_out"]


def test_who_reads_no_labels_does_not_care(unnamed, tmp_path):
    (result,) = train(config_of(unnamed, tmp_path, 0))
    assert result["status"] == "finished"
