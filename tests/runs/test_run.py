"""The folder of a run as an object: where things lie, what their files say, how far it is."""

import json
import os
import shutil
import subprocess
import sys

import pytest

import dinogen
from dinogen.config import ConfigError, dump_config, parse_config
from dinogen.runs.layout import (
    checkpoint_name,
    checkpoint_nimg,
    parse_checkpoint,
    stage_name,
    stage_resolution,
)
from dinogen.runs.run import Run

STAGES = [{"resolution": 4, "kimg": 1}, {"resolution": 8, "kimg": 2}, {"resolution": 16, "kimg": 4}]


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value))


@pytest.fixture
def folder(tmp_path):
    """A run whose first stage is done, whose second is under way, and whose third waits."""
    folder = tmp_path / "first"
    config = parse_config({"run": str(folder), "seed": 7, "stages": STAGES})
    write(folder / "config.yaml", dump_config(config))
    write(folder / "4x4" / "result.json", {"nimg": 1000, "seconds": 12.5, "health": "ok"})
    write(folder / "4x4" / "stats.jsonl", '{"nimg": 500, "loss": 2}\n{"nimg": 1000, "loss": 1}\n')
    for nimg in (1400, 1200):
        write(folder / "8x8" / "checkpoints" / f"{nimg:09d}" / "state.json", {"data": "abc"})
    write(folder / "8x8" / "stats.jsonl", '{"nimg": 1200, "loss": 0.5}\n')
    return folder


def measure(folder, nimg=1000, **values):
    measured = {name: {"value": value, "reason": None} for name, value in values.items()}
    write(folder / "4x4" / "evaluation.json", {"nimg": nimg, "measured": measured})


# ---- where things lie ----------------------------------------------------------------------------


def test_everything_lies_where_a_run_leaves_it(folder):
    run = Run(folder)
    stage = run.stage(8)
    assert (run.config_file, run.page) == (folder / "config.yaml", folder / "index.html")
    assert (run.lock_file, run.samples_folder) == (folder / ".lock", folder / "samples")
    inside = folder / "8x8"
    assert stage.folder == inside
    assert stage.stats_file == inside / "stats.jsonl"
    assert stage.result_file == inside / "result.json"
    assert stage.metrics_file == inside / "metrics.jsonl"
    assert stage.evaluation_file == inside / "evaluation.json"
    assert stage.sweep_file == inside / "checkpoints.jsonl"
    assert stage.visualizations_folder == inside / "visualizations"
    assert stage.samples_folder == inside / "samples"
    assert stage.tensorboard_folder == inside / "tb"
    assert stage.checkpoints.at(1400) == inside / "checkpoints" / "000001400"


def test_names_of_earlier_versions_are_read_as_those_of_today(folder):
    run, inside = Run(folder), folder / "4x4"
    write(inside / "result.json", {"nimg": 1000, "verdict": "COLLAPSED"})
    write(inside / "evaluation.json", {"nimg": 1000, "verdict": "BROKEN", "measured": {}})
    write(inside / "looks" / "looks.json", {"grid16": {"file": "grid16.png", "nimg": 1000}})
    progress = {"nimg": 1400, "verdict": "COLLAPSING"}
    write(folder / "8x8" / "checkpoints" / "000001400" / "state.json", {"progress": progress})
    stage = run.stage(4)
    assert stage.result == {"nimg": 1000, "health": "COLLAPSED"}
    assert stage.evaluation["health"] == "BROKEN"
    assert stage.visualizations["grid16"]["file"] == "grid16.png" and stage.visualized
    assert stage.visualizations_folder == inside / "looks"
    state = next(run.stage(8).checkpoints.iter_states()).value
    assert state["progress"] == {"nimg": 1400, "health": "COLLAPSING"}
    write(inside / "result.json", {"health": "ok", "verdict": "COLLAPSED", "nimg": 1000})
    assert stage.result == {"health": "ok", "nimg": 1000}
    (inside / "visualizations").mkdir()
    assert stage.visualizations_folder == inside / "visualizations"


def test_a_run_is_named_by_a_path_that_ends_in_its_name(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert Run(".").path == folder.resolve()
    (folder / "4x4" / "deeper").mkdir()
    monkeypatch.chdir(folder / "4x4")
    assert Run("..").config.run == folder.resolve()
    assert str(Run("first").path) == "first"


@pytest.mark.parametrize(
    ("name", "resolution"),
    {
        "8x8": 8, "1024x1024": 1024, "8x16": None, "08x08": None, "8x8.old": None, "x": None,
        "0x0": None, "٨x٨": None, "8X8": None, "": None, "8x8x8": None,
    }.items(),
)  # fmt: skip
def test_only_a_square_names_a_stage(name, resolution):
    assert stage_resolution(name) == resolution
    if resolution is not None:
        assert stage_name(resolution) == name


def test_a_checkpoint_is_told_by_its_path(tmp_path):
    path = tmp_path / "first" / "16x16" / "checkpoints" / "000001400"
    assert parse_checkpoint(path) == (tmp_path / "first", 16, 1400)
    others = (path.parent, path / "state.json", path.parents[1] / "other" / path.name)
    others += (tmp_path / "torch" / "hub" / "checkpoints" / "7", path.relative_to(path.parents[1]))
    assert [one for one in others if parse_checkpoint(one) is not None] == []
    assert (checkpoint_name(1400), checkpoint_nimg("000001400")) == ("000001400", 1400)
    assert [checkpoint_nimg(name) for name in (".tmp-000001400", ".broken-7", "²", "")] == [
        None
    ] * 4


def test_checkpoints_are_in_the_order_of_their_images(folder):
    place = folder / "8x8" / "checkpoints"
    for name in ("1000000000", "999999999", ".tmp-000001600", ".broken-000001300", "notes"):
        (place / name).mkdir()
    (place / "000001500").write_text("a file")
    found = Run(folder).stage(8).checkpoints
    assert found.nimg == [1200, 1400, 999_999_999, 1_000_000_000]  # the last of ten digits
    assert found.newest == place / "1000000000"
    assert [one.value for one in found.iter_states() if one.there] == [{"data": "abc"}] * 2
    none = Run(folder).stage(16).checkpoints
    assert (none.nimg, none.newest, list(none.iter_states())) == ([], None, [])


# ---- config and stages ---------------------------------------------------------------------------


def test_the_config_follows_a_moved_run_and_takes_places(folder, tmp_path):
    shutil.move(folder, tmp_path / "moved")
    run = Run(tmp_path / "moved", places=["data.path=/mnt/faces"])
    assert run.config.run == tmp_path / "moved"
    assert (run.config.seed, run.config.data.path) == (7, "/mnt/faces")
    assert run.stage(4).folder == tmp_path / "moved" / "4x4"


def test_the_config_is_read_once(folder):
    run = Run(folder)
    first = run.config
    (folder / "config.yaml").unlink()
    assert run.config is first


def test_what_is_no_run_is_named(tmp_path, folder):
    with pytest.raises(ConfigError, match=r"no run here \(config\.yaml is missing\)") as error:
        _ = Run(tmp_path / "typo").stages
    assert str(tmp_path / "typo") in str(error.value)
    (folder / "config.yaml").write_text("stages: 3")
    with pytest.raises(ConfigError, match="stages"):
        _ = Run(folder).status
    assert [stage.resolution for stage in Run(folder).begun] == [4, 8]  # files tell, all the same
    assert Run(folder).stage(4).result == {"nimg": 1000, "seconds": 12.5, "health": "ok"}


def test_stages_are_those_of_the_config_and_those_begun(folder):
    (folder / "32x32").mkdir()  # the config was shortened since
    (folder / "64x64").write_text("no folder")
    (folder / "8x16").mkdir()
    run = Run(folder)
    assert [stage.name for stage in run.stages] == ["4x4", "8x8", "16x16", "32x32"]
    assert [stage.name for stage in run.planned] == ["4x4", "8x8", "16x16"]
    assert [stage.name for stage in run.begun] == ["4x4", "8x8", "32x32"]
    assert run.stage(8).config.kimg == 2
    with pytest.raises(ConfigError, match=r"stage 32 is not in the config: .*\[4, 8, 16\]"):
        _ = run.stage(32).config


# ---- how far it is -------------------------------------------------------------------------------


def test_status_and_progress_are_those_of_the_files(folder):
    run = Run(folder)
    assert [stage.status for stage in run.planned] == ["done", "begun", "not begun"]
    assert [stage.progress for stage in run.planned] == ["1 kimg, ok", "1.2 of 3 kimg", ""]
    assert [stage.nimg for stage in run.planned] == [1000, 1200, None]
    assert [stage.end for stage in run.planned] == [1000, 3000, 7000]
    assert (run.status, run.last_done.resolution) == ("begun", 4)
    for size, nimg in ((8, 3000), (16, 7000)):
        write(folder / f"{size}x{size}" / "result.json", {"nimg": nimg})
    assert (run.status, run.last_done.resolution) == ("done", 16)
    shutil.rmtree(folder / "4x4")
    assert run.status == "begun"


def test_a_run_at_hand_need_not_have_begun(tmp_path):
    run = Run.of(parse_config({"run": str(tmp_path / "later"), "stages": STAGES}))
    assert (run.status, run.last_done, run.begun, run.has_config) == ("not begun", None, (), False)
    assert [stage.progress for stage in run.stages] == ["", "", ""]
    assert list(tmp_path.iterdir()) == []


def test_a_stage_that_was_made_longer_is_not_done(folder):
    config = Run(folder).config
    longer = config.model_copy(
        update={"stages": (config.stages[0].model_copy(update={"kimg": 1.5}), *config.stages[1:])}
    )
    stage = Run.of(longer).stage(4)
    assert (stage.done, stage.status, stage.progress) == (False, "begun", "1 of 1.5 kimg")
    assert stage.result["nimg"] == 1000
    write(folder / "4x4" / "result.json", {"nimg": 1000, "ended_early": True})
    assert stage.done  # as long as it was worth it


def test_a_length_in_epochs_is_known_once_the_run_has_written_it(folder):
    given = [{"resolution": 4, "epochs": 3}]
    run = Run.of(parse_config({"run": str(folder), "stages": given}))
    assert (run.stage(4).end, run.stage(4).done) == (None, False)
    assert run.stage(4).progress == "1 of ? kimg"
    written = parse_config({"run": str(folder), "stages": [given[0] | {"kimg": 0.9}]})
    write(folder / "config.yaml", dump_config(written))
    assert (run.stage(4).end, run.stage(4).done) == (900, True)


def test_only_what_was_measured_at_the_end_counts(folder):
    stage = Run(folder).stage(4)
    assert (stage.evaluated, stage.metric("fid"), stage.evaluation) == (False, None, None)
    measure(folder, fid=12.5)
    assert stage.evaluated
    assert (stage.metric("fid")["value"], stage.metric("kid")) == (12.5, None)
    measure(folder, nimg=500, fid=30.0)
    assert (stage.evaluated, stage.metric("fid")) == (False, None)
    assert stage.evaluation["measured"]["fid"]["value"] == 30.0
    measure(folder, fid=None)
    assert stage.metric("fid")["value"] is None
    assert stage.metric("fid")["reason"]


def test_only_images_of_the_end_count(folder):
    stage = Run(folder).stage(4)
    assert (stage.visualized, stage.visualizations) == (False, {})
    index = folder / "4x4" / "visualizations" / "visualizations.json"
    write(index, {"grid16": {"file": "grid16.png", "nimg": 500}})
    assert not stage.visualized
    write(index, {"grid16": {"file": "grid16.png", "nimg": 1000}})
    assert stage.visualized
    assert stage.visualizations["grid16"]["file"] == "grid16.png"


# ---- what files say ------------------------------------------------------------------------------


def test_files_are_read_each_time(folder):
    stage = Run(folder).stage(8)
    assert [line["nimg"] for line in stage.stats] == [1200]
    with (folder / "8x8" / "stats.jsonl").open("a") as file:
        file.write('{"nimg": 1400, "loss": 0.4}\n')
    assert [line["nimg"] for line in stage.stats] == [1200, 1400]
    line = {"nimg": 1400, "metrics": {"fid": {"value": 5.0, "reason": None}}}
    write(folder / "8x8" / "metrics.jsonl", json.dumps(line))
    write(folder / "8x8" / "checkpoints.jsonl", json.dumps(line | {"nimg": 1200}))
    assert [one["metrics"]["fid"]["value"] for one in stage.metrics] == [5.0]
    assert [one["nimg"] for one in stage.sweep] == [1200]


def test_damage_costs_only_what_is_damaged_and_is_named(folder):
    stage = Run(folder).stage(4)
    for path in (stage.result_file, stage.evaluation_file):
        write(path, "{")
    write(stage.visualizations_folder / "visualizations.json", "[]")
    write(stage.stats_file, '{"nimg": 500, "loss": 2}\n{"nimg"\n')
    assert (stage.result, stage.evaluation, stage.visualizations) == (None, None, {})
    assert [line["nimg"] for line in stage.stats] == [500]
    assert (stage.status, stage.progress) == ("begun", "0.5 of 1 kimg")
    reads = (stage.read_result, stage.read_evaluation, stage.read_visualizations, stage.read_stats)
    told = [read().messages(folder) for read in reads]
    names = ("result.json", "evaluation.json", "visualizations/visualizations.json", "stats.jsonl")
    assert [one[0].startswith(f"4x4/{name}") for one, name in zip(told, names, strict=True)] == [
        True
    ] * 4


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every folder")
def test_a_folder_that_cannot_be_listed_is_named(folder):
    folder.chmod(0o300)
    try:
        assert "Permission denied" in Run(folder).read_stages().messages()[0]
    finally:
        folder.chmod(0o700)


def test_it_is_part_of_the_public_api_and_imports_no_torch(folder):
    assert dinogen.Run is Run
    code = (
        "import sys, dinogen; print(dinogen.Run(sys.argv[1]).stage(4).done, 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["True", "False"]
