"""The table of a dry run against runs whose speed is known."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from launch.cli.main import app
from launch.slurm.forecast import limit_seconds


def dry_run(folder, *words):
    arguments = ["launch", str(folder / "my.yaml"), "--on", "slurm", "--dry-run", *words]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.exception
    lines = result.output.splitlines()
    return {line.split()[0]: line for line in lines if line and line[0] != " "}, result.output


def train(folder, run, size, **more):
    place = folder / run / f"{size}x{size}"
    place.mkdir(parents=True)
    (folder / run / "config.yaml").write_text("{}")
    result = {"nimg": 1000, "family": "progressive_gan", "images_per_s": 2.0, "world_size": 1}
    (place / "result.json").write_text(json.dumps(result | {"health": "ok", **more}))


@pytest.fixture(autouse=True)
def in_its_folder(played, monkeypatch):
    monkeypatch.chdir(played)


def test_without_a_measured_speed_the_limit_stands(played):
    rows, text = dry_run(played, "--time", "12:00:00")
    assert rows["train-4"].split()[:4] == ["train-4", "1", "1", "<12:00:00"]
    assert rows["train-4"].split()[-1] == "<12.0"
    assert rows["train-8"].split()[-2] == "train-4"
    assert "no progressive_gan was trained" in " ".join(text.split())


def test_a_run_beside_it_lends_its_speed_and_memory(played):
    train(played, "other", 8, peak_memory_mb=2048, device="H100")
    rows, text = dry_run(played)
    # 1000 images at 2 a second; a stage of half the side is four times as fast
    assert "~8.33 min" in rows["train-8"] and "2.0 GiB" in rows["train-8"]
    assert "~2.08 min" in rows["train-4"] and "~33.3 min" in rows["train-16"]
    assert rows["train-16"].split()[-1] == "~0.6"
    words = " ".join(text.split())
    assert "2/s on 1x H100 in" in words and "estimated at 4 times" in words
    assert "memory: estimated" in words and "memory: measured in" in words


def test_a_stage_of_the_run_itself_is_measured(played):
    train(played, "run", 4)
    (played / "run" / "4x4" / "result.json").unlink()
    line = {"nimg": 500, "images_per_s": 5.0}
    (played / "run" / "4x4" / "stats.jsonl").write_text(json.dumps(line) + "\n")
    rows, _ = dry_run(played)
    assert rows["train-4"].split()[3:5] == ["1.67", "min"]  # 500 images at 5 a second


def test_it_fits_80_columns_and_shows_setup(played):
    lines = ["module load cuda", "export A=b"]
    _, text = dry_run(played, f"cluster.setup={json.dumps(lines)}")
    table = text.partition("commands:")[0].splitlines()
    assert max(map(len, table)) <= 80
    assert text.index("setup:") < text.index("  module load cuda") < text.index("  export A=b")


def test_photos_of_data_that_are_packed_get_an_answer(played):
    (played / "photos").mkdir()
    _, text = dry_run(played, "--photos", str(played / "photos"))
    assert "is packed already" in text and "dinogen prepare" in text


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("10", 600), ("10:30", 630), ("12:00:00", 43_200), ("2-12", 216_000), ("1-00:30", 88_200)],
)
def test_times_as_slurm_writes_them(text, seconds):
    assert limit_seconds(text) == seconds
    assert limit_seconds("UNLIMITED") == float("inf")
