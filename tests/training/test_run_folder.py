"""The folder of a run: copied elsewhere, read-only, damaged, or asked for less than it has."""

from __future__ import annotations

import json
import os
import shutil
import stat

import pytest
import torch
from typer.testing import CliRunner

from dinogen.config import ConfigError, dump_config, load_config
from dinogen.runs.lock import run_lock
from dinogen.training.logging.logger import cut_lines
from dinogen.training.run import train
from launch.cli.main import app
from tests.families.tiny import pack_discs, tiny_config
from tests.training.helpers import curve, stage, weights
from tests.training.on_ranks import lock_here, on_ranks

SIZE = 16


@pytest.fixture
def tiny(tmp_path):
    """Config of a run of four steps that saves at each; ``overrides`` as on the command line."""
    pack_discs(tmp_path / "discs")

    def make(*overrides, run="run"):
        # where half of a run ends it is probed, so all of it is probed there too
        often = ("checkpoint.every_kimg=0.008", "log.samples_kimg=0.016")
        return tiny_config("dcgan", tmp_path / "discs", tmp_path / run, *often, *overrides)

    return make


def half_done(tiny, run="run"):
    """A run that was stopped in its midst: what it left, and the config that it was to finish."""
    train(tiny("stages.0.kimg=0.016", run=run))
    (stage(tiny(run=run), SIZE) / "result.json").unlink()
    return tiny(run=run)


def command(*words):
    return CliRunner().invoke(app, ["train", *map(str, words)])


# ---- moved ---------------------------------------------------------------------------------------


def test_a_config_beside_its_stages_means_this_run(tiny, tmp_path, monkeypatch):
    whole = tiny(run="whole")
    train(whole)
    half_done(tiny, run="old")
    place = tmp_path / "elsewhere"
    place.mkdir()
    shutil.move(tmp_path / "old", place / "moved")
    shutil.move(tmp_path / "discs", place / "data")  # the same data in another place
    monkeypatch.chdir(place)
    result = command("moved/config.yaml", "data.path=data", "stages.0.kimg=0.032")
    assert result.exit_code == 0, result.output
    assert not (tmp_path / "old").exists()
    moved = load_config("moved/config.yaml")
    assert moved.run.resolve() == place / "moved"
    left, right = weights(moved, SIZE), weights(whole, SIZE)
    assert [name for name in right if not torch.equal(left[name], right[name])] == []
    assert curve(moved, SIZE) == curve(whole, SIZE)


def test_a_copy_goes_on_where_it_lies(tiny, tmp_path):
    config = half_done(tiny)
    shutil.copytree(config.run, tmp_path / "copy")
    assert load_config(tmp_path / "copy" / "config.yaml").run == tmp_path / "copy"
    assert load_config(config.run / "config.yaml").run == config.run


def test_an_override_names_another_run(tiny, tmp_path):
    config = half_done(tiny)
    shutil.move(config.run, tmp_path / "moved")
    again = load_config(tmp_path / "moved" / "config.yaml", [f"run={tmp_path / 'new'}"])
    assert again.run == tmp_path / "new"


@pytest.mark.parametrize("name", ["config.yaml", "my.yaml"])
def test_a_config_that_lies_beside_no_stage_means_the_run_it_names(tiny, tmp_path, name):
    path = tmp_path / "configs" / name
    path.parent.mkdir()
    path.write_text(dump_config(tiny()))
    assert load_config(path).run == tmp_path / "run"


def test_a_folder_of_images_named_like_a_stage_is_no_run(tiny, tmp_path):
    project = tmp_path / "project"
    (project / "64x64").mkdir(parents=True)
    (project / "64x64" / "a.png").write_bytes(b"")
    (project / "config.yaml").write_text(dump_config(tiny()))
    assert load_config(project / "config.yaml").run == tmp_path / "run"


def test_what_a_moved_run_lacks_is_named_by_its_key(tiny, tmp_path, monkeypatch):
    config = half_done(tiny)
    text = dump_config(config.model_copy(update={"data": config.data.model_copy()}))
    (config.run / "config.yaml").write_text(text.replace(str(tmp_path / "discs"), "data/discs"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=rf"data\.path: data/discs is not there .*{tmp_path}"):
        train(load_config(config.run / "config.yaml"))


def test_the_places_of_a_mix_are_named_one_by_one(tiny, tmp_path):
    there = str(tmp_path / "discs")
    mix = f"data.mix=[{{path: {there}, weight: 1}}, {{path: {there}2, weight: 1}}]"
    config = tiny("data.path=''", mix)
    with pytest.raises(ConfigError, match=rf"data\.mix\.1\.path: {there}2 is not there"):
        train(config)


def test_a_refused_setting_offers_a_new_run_from_these_weights(tiny):
    config = half_done(tiny)
    with pytest.raises(ConfigError, match=rf"seed: .*set run= .*init_from={config.run}"):
        train(tiny("seed=3"))
    forked = tiny("seed=3", f"init_from={config.run}", run="forked")
    assert train(forked)[0]["nimg"] == 32


# ---- less than it has ----------------------------------------------------------------------------


def test_a_stage_that_was_made_shorter_counts_as_finished(tiny, caplog):
    config = half_done(tiny)
    shutil.copytree(config.run, config.run.with_name("lost"))
    (stage(config, SIZE) / "stats.jsonl").unlink()
    (result,) = train(tiny("stages.0.kimg=0.004"))
    assert (result["status"], result["nimg"]) == ("finished", 16)
    assert "seen 16 images and the config ends it at 4 (kimg or epochs were lowered)" in caplog.text
    assert weights(config, SIZE).keys() == weights(tiny(run="lost"), SIZE).keys()


def test_what_was_logged_past_the_checkpoint_is_not_in_the_result(tiny):
    config = half_done(tiny)
    lines = stage(config, SIZE) / "stats.jsonl"
    with lines.open("a") as file:
        file.write('{"nimg": 24, "diversity": 0.5}\n')
    (result,) = train(tiny("stages.0.kimg=0.004"))
    assert result["diversity"] not in (None, 0.5) and '"nimg": 24' not in lines.read_text()


# ---- damaged -------------------------------------------------------------------------------------


def test_bad_bytes_in_its_files_do_not_stop_a_run(tiny, caplog):
    whole = tiny(run="whole")
    train(whole)
    config = half_done(tiny)
    folder = stage(config, SIZE)
    stats = (folder / "stats.jsonl").read_bytes()
    (folder / "stats.jsonl").write_bytes(b"\xff\n" + stats + b'{"nimg": "x"}\n{"nimg": 10')
    (folder / "metrics.jsonl").write_bytes(b'{"nimg": 1000, "metr')
    (folder / "result.json").write_text('{"nimg": "many"}')
    (config.run / "config.yaml").write_text("notes: some text\nfamily: dcgan\n")
    train(config)
    assert curve(config, SIZE) == curve(whole, SIZE)
    assert f"{folder / 'stats.jsonl'}: 3 damaged lines" in caplog.text
    assert (folder / "stats.jsonl.damaged").read_bytes().startswith(b"\xff\n")
    assert json.loads((folder / "result.json").read_text())["nimg"] == 32


@pytest.mark.parametrize("text", ['{"nimg": "many"}', "[1]", "\ud800", '{"nimg": 32, "files": 3}'])
def test_a_damaged_result_is_written_again(tiny, text):
    config = tiny()
    train(config)
    path = stage(config, SIZE) / "result.json"
    before = json.loads(path.read_text())
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    (result,) = train(config)
    assert result["nimg"] == 32 and json.loads(path.read_text()).keys() == before.keys()
    assert command(config.run / "config.yaml").exit_code == 0


def test_only_a_cut_line_leaves_no_copy(tmp_path):
    path = tmp_path / "stats.jsonl"
    path.write_bytes(b'{"nimg": 8}\n{"nimg": 16}\n{"nim')
    cut_lines(path, 8)
    assert path.read_bytes() == b'{"nimg": 8}\n'
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state["progress"].update(nimg="many"),
        lambda state: state.update(progress=[]),
        lambda state: state.pop("start"),
        lambda state: state.update(config="dcgan"),
        lambda state: state.update(files={}),
    ],
)
def test_a_state_that_makes_no_sense_costs_only_its_steps(tiny, caplog, change):
    whole = tiny(run="whole")
    train(whole)
    config = tiny()
    train(config)
    newest = stage(config, SIZE) / "checkpoints" / "000000032"
    state = json.loads((newest / "state.json").read_text())
    change(state)
    (newest / "state.json").write_text(json.dumps(state))
    train(config)
    assert "is broken and skipped" in caplog.text
    caplog.clear()
    train(config)  # what was broken is there again
    assert "broken" not in caplog.text
    left, right = weights(config, SIZE), weights(whole, SIZE)
    assert [name for name in right if not torch.equal(left[name], right[name])] == []


# ---- not writable --------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["", "16x16", "16x16/checkpoints"])
def test_a_folder_that_cannot_be_written_is_known_before_the_work(tiny, place, monkeypatch):
    config = half_done(tiny)
    folder = config.run / place
    before = sorted(config.run.rglob("*"))
    monkeypatch.setattr("dinogen.training.run.open_data", lambda config: pytest.fail("it began"))
    if os.geteuid():
        mode = folder.stat().st_mode
        folder.chmod(mode & ~(stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH))
    else:
        from tempfile import TemporaryFile

        def refuse(**words):
            if words["dir"] == folder:
                raise OSError(30, "Read-only file system", f"{folder}/tmpx1")
            return TemporaryFile(**words)

        monkeypatch.setattr("dinogen.runs.lock.tempfile.TemporaryFile", refuse)
    try:
        with pytest.raises(ConfigError, match=rf"{folder}: .*: choose a writable folder .*run="):
            train(config)
    finally:
        folder.chmod(0o755)
    assert sorted(config.run.rglob("*")) == before


def test_a_parent_that_cannot_hold_a_run_is_named(tmp_path):
    (tmp_path / "file").touch()
    told = pytest.raises(ConfigError, match=r"/file/run: Not a directory: choose a writable folder")
    with told, run_lock(tmp_path / "file" / "run"):
        pass


@pytest.mark.parametrize("what", ["no folder", "in use"])
def test_every_rank_says_at_once_why_a_run_cannot_be_trained(tmp_path, what):
    run = tmp_path / "run"
    if what == "no folder":
        run.touch()
        on_ranks(2, lock_here, str(run), str(tmp_path / "said"))
    else:
        with run_lock(run):
            on_ranks(2, lock_here, str(run), str(tmp_path / "said"))
    # Each by itself: a rank that is ended by another one's failure would have written nothing.
    first, second = (json.loads((tmp_path / f"said{rank}.json").read_text()) for rank in (0, 1))
    wanted = "choose a writable folder" if what == "no folder" else "another process"
    assert first == second and wanted in first


def test_slurm_is_named_where_two_tasks_train_one_run(tmp_path, monkeypatch):
    with run_lock(tmp_path):
        monkeypatch.setenv("SLURM_PROCID", "1")
        told = pytest.raises(ConfigError, match=r"another process trains .* task 1 of a SLURM job")
        with told, run_lock(tmp_path):
            pass


@pytest.mark.parametrize("name", [".lock", "config.yaml"])
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["pipe", "folder"])
def test_what_is_no_file_is_named_and_not_waited_for(tmp_path, name, make):
    make(tmp_path / name)
    told = pytest.raises(ConfigError, match=rf"{name}: it is not a regular file: move it away")
    with told, run_lock(tmp_path):
        pass


@pytest.mark.parametrize("file", ["state.json", "G.safetensors"])
def test_a_pipe_in_a_checkpoint_costs_only_its_steps(tiny, caplog, file):
    config = half_done(tiny)
    newest = max((stage(config, SIZE) / "checkpoints").iterdir())
    (newest / file).unlink()
    os.mkfifo(newest / file)
    train(config)
    assert "not a regular file" in caplog.text
    assert (stage(config, SIZE) / "result.json").is_file()


def test_a_run_is_named_where_it_is_the_current_folder(tiny, tmp_path, monkeypatch):
    train(tiny())
    (tmp_path / "run" / "config.yaml").rename(tmp_path / "run" / "kept.yaml")
    text = (tmp_path / "run" / "kept.yaml").read_text().replace(f"run: {tmp_path}/run", "run: else")
    (tmp_path / "run" / "config.yaml").write_text(text)
    monkeypatch.chdir(tmp_path / "run")
    assert load_config("config.yaml").run == tmp_path / "run"
    assert load_config("./config.yaml", ["run=."]).run == tmp_path / "run"
    result = command("config.yaml")
    assert result.exit_code == 0, result.output
    assert load_config("config.yaml").run == tmp_path / "run"
    assert f"page: {tmp_path}/run/index.html" in result.output


# ---- one rank ------------------------------------------------------------------------------------


def test_ddp_of_one_rank_is_what_one_process_computes(tiny):
    one, alone = tiny(run="one"), tiny("engine.name=ddp", run="alone")
    train(one)
    train(alone)
    left, right = weights(alone, SIZE), weights(one, SIZE)
    assert [name for name in right if not torch.equal(left[name], right[name])] == []
