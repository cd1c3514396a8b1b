"""What a run sends to W&B, MLflow, Trackio and a table, read back by the libraries' own readers."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import re
import shutil
import signal
import sqlite3
import struct
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dinogen.config import ConfigError, dump_config, parse_config
from dinogen.runs.run import Run
from dinogen.training.logging.logger import Logger
from dinogen.training.logging.sinks import senders
from dinogen.training.logging.sinks.registry import sink_class, sink_names
from dinogen.training.logging.sinks.sender import Sender, covered, events_between
from dinogen.training.logging.sinks.senders import show_results
from dinogen.training.run import train
from dinogen.training.trainer import Trainer
from tests import forked
from tests.training.helpers import WALL_CLOCK, stage
from tests.training.sink_stores import die_after
from tests.training.sink_stores import place as place
from tests.training.sink_stores import stores as stores

SENT = ("wandb", "mlflow", "trackio")


# ---- readers: {name: [(step, value)]} of a run, in the order in which it was written ------------


def wandb_records(config):
    """Of all offline files, by a reader of its own: LevelDB's log of W&B's messages."""
    from wandb.proto import wandb_internal_pb2

    for file in sorted(config.run.glob("logging/wandb/offline-run-*/run-*.wandb")):
        for data in leveldb_records(file.read_bytes()):
            yield wandb_internal_pb2.Record.FromString(data)


def wandb_history(config):
    found = {}
    for record in wandb_records(config):
        if record.HasField("history"):
            for item in record.history.item:
                name = item.key or "/".join(item.nested_key)
                value = json.loads(item.value_json)
                found.setdefault(name, []).append((record.history.step.num, value))
    return found


def leveldb_records(data):
    assert data[:4] == b":W&B"
    stream = bytearray()
    for begin in range(0, len(data), 32768):
        block = data[begin : begin + 32768]
        at = 7 if begin == 0 else 0
        while at + 7 <= len(block):
            _, length, kind = struct.unpack_from("<IHB", block, at)
            stream += block[at + 7 : at + 7 + length]
            at += 7 + length
            if at > len(block):
                return  # cut off
            if kind in (1, 4):
                yield bytes(stream)
                stream.clear()


def sent(config, name):
    """What is kept of a sink in the folder of the run."""
    return json.loads((config.run / "logging" / f"{name}.json").read_text())


def mlflow_history(config):
    from mlflow import MlflowClient

    client, known = MlflowClient(), sent(config, "mlflow")["id"]
    return {
        name: [(one.step, one.value) for one in client.get_metric_history(known, name)]
        for name in client.get_run(known).data.metrics
    }


def trackio_rows(query, *values):
    with sqlite3.connect(Path(os.environ["TRACKIO_DIR"]) / "dinogen.db") as database:
        return list(database.execute(query, values))


def trackio_history(config):
    found = {}
    query = "SELECT step, metrics FROM metrics WHERE run_name = ? ORDER BY id"
    for step, metrics in trackio_rows(query, sent(config, "trackio")["name"]):
        for name, value in json.loads(metrics).items():
            found.setdefault(name, []).append((step, value))
    return found


HISTORY = {"wandb": wandb_history, "mlflow": mlflow_history, "trackio": trackio_history}


def curves(history):
    """Without what a clock measures, and without what is no number."""
    return {
        name: points
        for name, points in history.items()
        if name not in WALL_CLOCK
        and not name.startswith(("_", "final/", "samples/"))
        and all(isinstance(value, (int, float)) for _, value in points)
    }


def logged(config, resolutions=(4, 8)):
    """The same of the run's own lines."""
    found = {}
    for resolution in resolutions:
        for line in (stage(config, resolution) / "stats.jsonl").read_text().splitlines():
            for name, value in json.loads(line).items():
                if value is not None and name not in WALL_CLOCK:
                    found.setdefault(name, []).append((json.loads(line)["nimg"], value))
    return found


@pytest.fixture
def killed(make_config, place, stores):
    """A run in a study that was killed twice and has ended; made once."""
    folder = place / "study" / "first" / "0"
    config = make_config("logging=[wandb, mlflow, trackio, csv]", run=str(folder))
    if not folder.exists():
        folder.mkdir(parents=True)
        (place / "study" / "study.json").write_text("{}")
        for nimg in (24, 120):
            arguments = (place, config.model_dump(mode="json"), nimg)
            process = forked.context().Process(target=die_after, args=arguments)
            process.start()
            process.join()
            assert process.exitcode == -signal.SIGKILL
        train(config)
    return config


def test_killed_and_resumed_each_shows_the_curve_of_a_run_that_never_was(
    killed, make_config, place, monkeypatch
):
    reference = make_config("logging=[]", run=str(place / "whole"))
    train(reference)
    assert not list(reference.run.glob("*/tb")) and not (reference.run / "logging").exists()
    expected = logged(reference)
    assert len(expected["loss"]) >= 15 and expected["stage"][-1] == (240, 8)
    for name in SENT:
        assert curves(HISTORY[name](killed)) == expected, name
    with (killed.run / "stats.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    table = {
        name: [(int(row["nimg"]), float(row[name])) for row in rows if row[name]]
        for name in rows[0]
        if name not in WALL_CLOCK
    }
    assert table == expected


def test_samples_stand_at_their_images_seen(killed):
    from mlflow import MlflowClient

    files = [path for size in (4, 8) for path in sorted(stage(killed, size).glob("samples/*.png"))]
    at = [int(path.stem) for path in files]
    assert at == [80, 160, 240]

    sizes = wandb_history(killed)["samples/size"]
    assert sizes == [(nimg, file.stat().st_size) for nimg, file in zip(at, files, strict=True)]
    logged_files = killed.run.glob("logging/wandb/offline-run-*/files/media/images/*.png")
    assert sorted(file.read_bytes() for file in logged_files) == sorted(
        file.read_bytes() for file in files
    )

    client, record = MlflowClient(), sent(killed, "mlflow")
    names = [Path(one.path).name for one in client.list_artifacts(record["id"], "images")]
    for nimg in at:
        assert len([name for name in names if name.startswith(f"samples+step+{nimg}+")]) == 2

    assert [step for step, _ in trackio_history(killed)["samples"]] == at


def test_config_health_results_and_the_study_are_there(killed):
    from mlflow import MlflowClient

    result = json.loads((stage(killed, 8) / "result.json").read_text())
    changes = [
        json.loads(line)
        for size in (4, 8)
        for line in (stage(killed, size) / "health.jsonl").read_text().splitlines()
    ]
    assert changes and changes[-1]["status"] == result["health"]
    health = [(line["nimg"], line["status"]) for line in changes]

    assert wandb_history(killed)["health"] == health
    runs = [record.run for record in wandb_records(killed) if record.HasField("run")]
    assert {(run.run_id, run.project, run.run_group) for run in runs} == {
        (sent(killed, "wandb")["id"], "dinogen", "study")
    }
    configs = [record.config for record in wandb_records(killed) if record.HasField("config")]
    values = {item.key: json.loads(item.value_json) for one in configs for item in one.update}
    assert values["family"]["z_dim"] == 8 and values["stages"][0]["lr"] == 0.01
    summaries = [record.summary for record in wandb_records(killed) if record.HasField("summary")]
    values = {
        item.key or "/".join(item.nested_key): json.loads(item.value_json)
        for one in summaries
        for item in one.update
    }
    assert values["final/loss"] == result["loss"] and values["health"] == result["health"]

    found = MlflowClient().get_run(sent(killed, "mlflow")["id"])
    assert found.data.params["family.z_dim"] == "8" and found.data.params["seed"] == "0"
    assert found.data.tags["health"] == result["health"]
    assert found.data.metrics["final/loss"] == result["loss"]
    assert found.data.tags[f"warnings.{changes[-1]['nimg']}"] == "\n".join(changes[-1]["warnings"])
    assert found.info.status == "FINISHED"
    assert MlflowClient().get_experiment(found.info.experiment_id).name == "study"

    assert trackio_history(killed)["health"] == health
    (config,) = trackio_rows("SELECT config FROM configs")
    assert json.loads(config[0])["family"]["z_dim"] == 8
    assert json.loads(config[0])["_Group"] == "study"
    alerts = trackio_rows("SELECT step, title, text FROM alerts ORDER BY step")
    assert alerts == [
        (line["nimg"], line["status"], warning) for line in changes for warning in line["warnings"]
    ]
    assert trackio_history(killed)["final/loss"][-1] == (240, result["loss"])


def test_the_grid_of_what_a_run_starts_from_is_shown_once(killed, make_config, stores, monkeypatch):
    from mlflow import MlflowClient

    logging = "logging=[tensorboard, wandb, mlflow, trackio]"
    config = make_config(logging, f"init_from={killed.run}", run="transfer")
    step, draw = Trainer.train_step, Trainer._draw

    def slow_draw(self):
        time.sleep(1.0)
        return draw(self)

    monkeypatch.setattr(Trainer, "train_step", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # before there is a checkpoint
        train(config, 4)
    monkeypatch.setattr(Trainer, "train_step", step)
    monkeypatch.setattr(Trainer, "_draw", slow_draw)
    train(config, 4)

    events = EventAccumulator(str(stage(config, 4) / "tb"), size_guidance={"images": 0})
    assert [image.step for image in events.Reload().Images("samples")] == [0, 80]
    assert [step for step, _ in wandb_history(config)["samples/size"]] == [0, 80]
    files = MlflowClient().list_artifacts(sent(config, "mlflow")["id"], "images")
    names = {Path(one.path).name.split("+")[2] for one in files}
    assert names == {"0", "80"}
    assert [step for step, _ in trackio_history(config)["samples"]] == [0, 80]
    first = json.loads((stage(config, 4) / "stats.jsonl").read_text().splitlines()[0])
    assert first["images_per_s"] > first["nimg"] / 1.0  # the time of drawing is not in it


def test_nothing_is_sent_twice_and_later_results_are_added(killed):
    before = {name: curves(HISTORY[name](killed)) for name in SENT}
    evaluation = {"nimg": 240, "metrics": {"held_out/mse": 0.25}}
    (stage(killed, 8) / "evaluation.json").write_text(json.dumps(evaluation))
    show_results(Run.of(killed).stage(8))
    assert {name: curves(HISTORY[name](killed)) for name in SENT} == before
    assert mlflow_history(killed)["final/held_out/mse"] == [(240, 0.25)]
    assert trackio_history(killed)["final/held_out/mse"] == [(240, 0.25)]
    train(killed)
    assert {name: curves(HISTORY[name](killed)) for name in SENT} == before


@pytest.mark.parametrize("cut", [3, 7, 11])
def test_what_a_sender_had_begun_when_it_was_killed_is_completed(killed, place, tmp_path, cut):
    """Stopped amid an event, with nothing of it in the record: as the machine goes down."""
    copy = tmp_path / f"copy{cut}"
    shutil.copytree(killed.run, copy, ignore=shutil.ignore_patterns("logging"))
    config = killed.model_copy(update={"run": copy})
    run = Run.of(config)
    events = events_between(run, 0, covered(run))
    for name in ("mlflow", "trackio"):
        first = Sender(run, name, lambda level, text: None)
        sink = first._open()
        for event in events[:cut]:
            sink.write(event)
        if name == "mlflow":  # its metrics are files of their own
            values = list(events[cut].values.items())[:3]
            sink._log(
                [(key, value) for key, value in values if value is not None], events[cut].nimg
            )
        sink.close("stopped")
        assert json.loads(first.path.read_text())["sent"] == -1
        second = Sender(run, name, lambda level, text: None)
        assert second.send()
        second.close("done")
        assert curves(HISTORY[name](config)) == logged(config), name


def test_a_torn_offline_file_is_completed_by_the_next(killed, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(killed.run, copy)
    config = killed.model_copy(update={"run": copy})
    files = copy.glob("logging/wandb/offline-run-*/run-*.wandb")
    longest = max(files, key=lambda file: file.read_bytes().count(b"grad_norm"))
    data = longest.read_bytes()
    longest.write_bytes(data[: (data.index(b"grad_norm") + data.rindex(b"grad_norm")) // 2])
    assert 0 < len(wandb_history(config)["loss"]) < len(logged(config)["loss"])
    show_results(Run.of(config).stage(8))
    assert curves(wandb_history(config)) == logged(config)


def test_the_command_of_the_page_takes_every_offline_folder(killed):
    page = (Path(__file__).parents[2] / "docs" / "logging.md").read_text()
    (command,) = re.findall(r"^```bash\n(.*)\n```", page, re.M)
    command = command.replace("runs/first", str(killed.run))
    wandb = Path(sys.executable).with_name("wandb")
    done = subprocess.run(
        ["bash", "-c", f"{wandb} {command.removeprefix('wandb')} --dry-run"],
        capture_output=True,
        text=True,
        check=True,
    )
    files = list(killed.run.glob("logging/wandb/offline-run-*/run-*.wandb"))
    assert len(files) >= 3
    assert f"Would sync {len(files)} run(s)" in done.stderr


def test_each_sink_and_option_is_on_the_page():
    page = (Path(__file__).parents[2] / "docs" / "logging.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| .* \| (.*) \|$", page, re.M)
    found = {name: re.findall(r"`(\w+)`", options) for name, options in rows}
    assert found == {name: list(sink_class(name).Options.model_fields) for name in found}
    assert sorted(found) == sink_names()


def test_a_server_that_is_away_stops_nothing_and_gets_all_of_it_later(
    make_config, stores, tmp_path, caplog
):
    os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"
    away = "logging=[{mlflow: {tracking_uri: 'http://me:hidden@127.0.0.1:9'}}]"
    train(make_config(away), 4)
    assert caplog.text.count("mlflow: NOTHING CAN BE SENT") == 1
    assert "training goes on" in caplog.text and "hidden" not in caplog.text
    assert caplog.text.count("NOT SENT: all that was logged") == 1

    config = make_config(f"logging=[{{mlflow: {{tracking_uri: '{tmp_path / 'back'}'}}}}]")
    train(config, 4)
    os.environ["MLFLOW_TRACKING_URI"] = str(tmp_path / "back")
    assert curves(mlflow_history(config)) == logged(config, (4,))


def test_a_lost_sender_is_reported_and_the_next_run_sends_the_rest(
    make_config, stores, caplog, monkeypatch
):
    config = make_config("logging=[trackio]", run="lost")
    step, ended = Trainer.train_step, []

    def end_senders(self, batch):
        step(self, batch)
        if self.progress.step == 4:
            children = psutil.Process().children()
            (sender,) = (one for one in children if "sinks.sender" in " ".join(one.cmdline()))
            ended.append(sender.pid)
            sender.kill()
            time.sleep(0.3)

    monkeypatch.setattr(Trainer, "train_step", end_senders)
    train(config, 4)
    assert ended and caplog.text.count("trackio: NOTHING MORE IS SENT") == 1
    assert "NOT EVERYTHING WAS SENT" not in caplog.text
    monkeypatch.setattr(Trainer, "train_step", step)
    train(config)
    assert curves(trackio_history(config)) == logged(config)


def test_results_of_a_run_from_elsewhere_are_sent_nowhere(killed, tmp_path, caplog, monkeypatch):
    """Its config names the servers; one that sends would find them with this user's logins."""
    started = []
    monkeypatch.setattr(senders.Senders, "start", lambda self, config, names: started.append(names))
    caplog.set_level("INFO")
    show_results(Run.of(killed).stage(8))
    assert started.pop() == list(SENT)

    copy = tmp_path / "copy"  # without what is known of the sinks
    shutil.copytree(killed.run, copy, ignore=shutil.ignore_patterns("logging"))
    snapshot = tmp_path / "hub" / "models--other--faces" / "snapshots" / ("0" * 40)
    shutil.copytree(killed.run, snapshot)
    links = tmp_path / "other--faces-0000000"
    shutil.copytree(snapshot, links, copy_function=lambda file, link: Path(link).symlink_to(file))
    inside = tmp_path / "inside"  # whose records alone are its own
    shutil.copytree(links, inside, symlinks=True)
    shutil.rmtree(inside / "logging")
    shutil.copytree(snapshot / "logging", inside / "logging")
    for folder in (copy, snapshot, links, inside):
        caplog.clear()
        show_results(Run(folder).stage(8))
        assert started.pop() == [] and caplog.text.count("gets nothing") == len(SENT), folder


def test_what_is_wrong_is_said_before_training(make_config, monkeypatch):
    for given, message in (
        ("[wandbb]", "logging: unknown sink 'wandbb': did you mean 'wandb'?"),
        (
            "[{wandb: {projekt: a}}]",
            "logging.wandb: unknown key 'projekt': did you mean 'project'?",
        ),
        ("[{wandb: {mode: off}}]", "logging.wandb: mode"),
        ("[{csv: {path: a}}]", "logging.csv: unknown key 'path'"),
    ):
        with pytest.raises(ConfigError, match=re.escape(message)):
            train(make_config(f"logging={given}"))
    found = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *rest: None if name == "mlflow" else found(name)
    )
    with pytest.raises(ConfigError, match=r"logging: mlflow needs .* pip install 'dinogen\[mlflow"):
        train(make_config("logging=[tensorboard, mlflow]"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("[csv, csv]", "csv occurs twice"),
        ("[{wandb: {}, csv: {}}]", "give a name, or a name with its options"),
        ("[{wandb: online}]", "wandb: 'online' are no options"),
    ],
)
def test_a_list_that_makes_no_sense_is_refused(make_config, given, message):
    with pytest.raises(ConfigError, match=message):
        make_config(f"logging={given}")


def test_names_and_options_survive_the_config_file(make_config):
    config = make_config("logging=[csv, {wandb: {project: faces}}, {trackio: }]")
    assert config.logging == ("csv", {"wandb": {"project": "faces"}}, "trackio")
    assert config.sinks == {"csv": {}, "wandb": {"project": "faces"}, "trackio": {}}
    assert parse_config(yaml.safe_load(dump_config(config))) == config
    assert make_config("logging=csv").sinks == {"csv": {}}
    assert make_config().sinks == {"tensorboard": {}}


def test_a_table_that_cannot_be_written_costs_no_training(make_config, caplog):
    config = make_config("logging=[csv]")
    (config.run / "stats.csv").mkdir(parents=True)
    (result,) = train(config, 4)
    assert result["status"] == "finished"
    assert caplog.text.count("csv CANNOT BE WRITTEN") == 1


@pytest.mark.parametrize("error", [OSError("disk full"), ValueError("disk full")])
def test_a_sink_that_fails_in_two_threads_at_once_is_left_out_once(make_config, caplog, error):
    config = make_config()
    logger = Logger(Run.of(config).stage(4), 4, torch.device("cpu"))
    both = threading.Barrier(2)

    def fail(*_):
        both.wait(10)
        raise error

    logger.sinks = {"csv": SimpleNamespace(write=fail, flush=fail)}
    with ThreadPoolExecutor() as pool:
        synced = pool.submit(logger.sync)
        logger.write_images(8, {})
        synced.result()
    assert logger.sinks == {}
    assert caplog.text.count("csv CANNOT BE WRITTEN, and lacks what follows: disk full") == 1
