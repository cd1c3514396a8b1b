"""Evaluations where something is missing: all else is measured, and printed as it is found."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from dinogen.evaluation import record
from dinogen.evaluation import subject as heldout
from dinogen.evaluation.evaluate import evaluate
from dinogen.training.run import train
from launch.cli.main import app
from shards import open_dataset, pack
from shards.errors import ShardsError
from tests.families.conftest import disc_data  # noqa: F401 - a fixture
from tests.families.tiny import pack_discs, tiny_config

SHORT = ("stages.0.kimg=0.008",)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, disc_data):  # noqa: F811
    """Folders of a GAN and of a guided run."""
    place = tmp_path_factory.mktemp("trained")
    for family in ("dcgan", "guided"):
        train(tiny_config(family, disc_data, place / family, *SHORT))
    return place


@pytest.fixture
def run(trained, tmp_path):
    """Copies of a run, whose data lie where no one finds them."""

    def make(family, **places):
        folder = shutil.copytree(trained / family, tmp_path / family)
        config = folder / "config.yaml"
        text = config.read_text()
        for old, new in places.items():
            key = {"data": "/data", "guide": "/guide"}[old]
            lines = [
                line.split(": ")[0] + f": {new}" if line.strip().endswith(key) else line
                for line in text.splitlines()
            ]
            text = "\n".join(lines) + "\n"
        config.write_text(text)
        return folder

    return make


def command(*words):
    return CliRunner().invoke(app, ["evaluate", *map(str, words), "--num-samples", "20"])


def written(run):
    return json.loads((run / "16x16" / "evaluation.json").read_text())


def test_a_moved_run_measures_what_needs_no_data(run, disc_data, monkeypatch):  # noqa: F811
    moved = run("dcgan", data="data/nowhere")
    done = command(moved, "--metrics", "faces")
    assert done.exit_code == 0, (done.output, done.exception)
    assert "  faces: " in done.stdout and "not available" not in done.stdout
    done = command(moved, "--metrics", "faces,fd_onet")
    assert done.exit_code == 0
    assert "not available: fd_onet: data.path: data/nowhere is not there" in done.stdout
    assert "give data.path=FOLDER" in done.stdout
    done = command(moved, "--metrics", "fd_onet", f"data.path={disc_data}")
    assert done.exit_code == 0 and "  fd_onet: " in done.stdout
    done = command(moved, "--metrics", "kd_onet")
    assert done.exit_code == 1 and "nothing was measured" in done.output
    # all of them, as far as they is available
    done = command(moved)
    assert done.exit_code == 0 and "  faces: " in done.stdout and "  spectrum: " not in done.stdout


def test_a_generator_needs_no_guide_to_be_measured(run, disc_data):  # noqa: F811
    lost = run("guided", guide="guides/moved-away")
    done = command(lost, "--metrics", "spectrum,faces")
    assert done.exit_code == 0, (done.output, done.exception)
    assert "  spectrum: " in done.stdout and "not available" not in done.stdout
    done = command(lost, "--metrics", "spectrum,guide_diversity,held_out")
    assert done.exit_code == 0, (done.output, done.exception)
    (line,) = [line for line in done.stdout.splitlines() if "not available" in line]
    assert "guides/moved-away" in line
    assert {"guide_diversity", "held_out", "probe"} <= set(line.replace(":", ",").split(", ")) | {
        "probe"
    }
    done = command(lost, "--metrics", "held_out", f"guide.path={disc_data.parent / 'guide'}")
    assert done.exit_code == 0 and "held_out/mse" in done.stdout


def test_a_place_that_cannot_be_written_is_known_before_the_work(run, tmp_path, monkeypatch):
    gan = run("dcgan")
    (gan / "16x16" / "evaluation.json").mkdir()
    done = command(gan, "--metrics", "faces")
    assert done.exit_code == 0, (done.output, done.exception)
    said = done.output
    assert said.index("RESULTS WILL ONLY BE PRINTED") < said.index("  faces: ")
    assert "NOT KEPT" in done.stdout
    done = command(gan, "--metrics", "faces", "--out", tmp_path / "new" / "mine.json")
    assert done.exit_code == 0 and "NOT KEPT" not in done.stdout
    found = json.loads((tmp_path / "new" / "mine.json").read_text())
    assert found["measured"]["faces"]["value"] is not None
    done = command(gan, "--metrics", "faces", "--out", tmp_path / "new")
    assert (tmp_path / "new" / "evaluation.json").is_file()
    (tmp_path / "file").touch()
    monkeypatch.setattr("dinogen.evaluation.evaluate.measure", None)  # it is not called
    done = command(gan, "--metrics", "faces", "--out", tmp_path / "file" / "below")
    assert "cannot be written" in str(done.exception)


def test_values_are_printed_even_if_a_later_step_fails(run, monkeypatch):
    gan = run("dcgan")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(record, "write_json", full)
    done = command(gan, "--metrics", "faces")
    assert "  faces: " in done.stdout
    assert "No space left on device" in str(done.exception)


def test_old_values_are_marked_and_nothing_false_is_said_of_them(run, caplog, disc_data):  # noqa: F811
    gan = run("dcgan", data="data/nowhere")
    first = evaluate(gan, num_samples=20, names=["faces", "fd_onet"])
    assert first["measured"]["fd_onet"]["value"] is None and first["measured_before"] == []
    changes = [f"data.path={disc_data}"]
    second = evaluate(gan, num_samples=20, names=["fd_onet"], changes=changes)
    assert second["measured"]["fd_onet"]["value"] is not None
    assert "was measured before" not in caplog.text
    assert second["measured_before"] == ["faces"]
    done = command(gan, "--metrics", "spectrum", *changes)
    line = next(line for line in done.stdout.splitlines() if line.startswith("  faces: "))
    assert "measured before: dinogen evaluate" in line


def test_values_of_another_run_are_not_used(run, tmp_path, disc_data):  # noqa: F811
    out = tmp_path / "out.json"
    evaluate(run("dcgan"), num_samples=20, names=["faces"], out=out)
    train(tiny_config("dcgan", disc_data, tmp_path / "other", *SHORT, "seed=7"))
    other = evaluate(tmp_path / "other", num_samples=20, names=["spectrum"], out=out)
    assert list(other["measured"]) == ["spectrum"] and other["measured_before"] == []


def test_a_probe_for_one_metric_keeps_the_held_out_ones(run):
    guided = run("guided")
    first = evaluate(guided, num_samples=20, names=["held_out"], split="train")
    held_out = {k: v for k, v in first["metrics"].items() if k.startswith("held_out/")}
    done = command(guided, "--metrics", "guide_diversity")
    assert done.exit_code == 0, (done.output, done.exception)
    second = written(guided)
    assert held_out and held_out.items() <= second["metrics"].items()
    assert (second["split"], second["num_samples"]) == ("train", first["num_samples"])
    assert second["measured_before"] == ["held_out"]
    old = [line for line in done.stdout.splitlines() if line.endswith("(measured before)")]
    assert len(old) == len(held_out)


def test_a_failure_to_read_held_out_samples_is_met_by_all_ranks(monkeypatch):
    def read(*args):
        raise ShardsError("the server is gone")

    class Measured:
        def held_out(self, networks, batch): ...

    met = []
    monkeypatch.setattr(heldout, "_read", read)
    monkeypatch.setattr(heldout.process_group, "any_rank", lambda mine: met.append(mine) or mine)
    for numbers in ([0, 1], []):
        with pytest.raises(ShardsError, match="the server is gone"):
            heldout.held_out_means(Measured(), {}, None, "val", numbers)
    assert met == [True, True]


def test_a_pipe_that_nobody_reads_costs_no_value(run):
    gan = run("dcgan")
    words = [sys.executable, "-m", "launch.cli", "evaluate", str(gan), "--metrics", "faces"]
    done = subprocess.run(
        ["bash", "-c", 'set -o pipefail; "$@" | true', "-", *words, "--num-samples", "20"],
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert written(gan)["measured"]["faces"]["value"] is not None


def test_cautions_stand_beside_values_of_few_images(run):
    found = evaluate(run("dcgan"), num_samples=20, names=["faces", "fd_onet", "kd_onet"])
    cautions = {name: one["caution"] for name, one in found["measured"].items()}
    assert cautions["faces"] == "from only 20 generated images (fewer than 1,000)"
    assert "20 generated and 7 real images" in cautions["kd_onet"]
    assert "than its features have dimensions (256)" in cautions["fd_onet"]
    assert "dimensions" not in cautions["kd_onet"]


def test_a_log_of_metrics_that_was_cut_off_costs_nothing(run):
    gan = run("dcgan")
    log = gan / "16x16" / "metrics.jsonl"
    log.write_text('{"nimg": 8, "metrics": {"faces": {"val')
    assert command(gan, "--metrics", "faces").exit_code == 0
    assert written(gan)["measured"]["faces"]["value"] is not None
    evaluation_file = gan / "16x16" / "evaluation.json"
    evaluation_file.write_bytes(b'\xff{"nimg"')
    done = command(gan, "--metrics", "faces")
    assert done.exit_code == 0 and "evaluation.json cannot be read" in done.output


def test_the_advice_of_an_empty_split_fits_the_data(tmp_path):
    pack_discs(tmp_path / "all")
    samples = [open_dataset(tmp_path / "all").sample(number) for number in range(3)]
    pack(samples, tmp_path / "three", val_fraction=0.0)
    config = tiny_config("dcgan", tmp_path / "three", tmp_path / "run", *SHORT)
    train(config)
    done = command(config.run, "--metrics", "fd_onet,faces")
    assert done.exit_code == 0, (done.output, done.exception)
    assert "has no samples in split val (but 3 in train)" in done.stdout
    assert "too few to hold some back: pack more photos" in done.stdout
    assert "0.05" not in done.stdout
