"""What TensorBoard finds of a run, read back by its own reader and shown in a real browser."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import metadata

from dinogen.metrics.value import MetricValue
from dinogen.runs.files import read_stats
from dinogen.runs.run import Run
from dinogen.training.logging.sinks.tensorboard import write_summary
from dinogen.training.run import train
from tests.browser import open_browser

from .helpers import stage

HPARAMS = {"_hparams_/session_start_info", "_hparams_/session_end_info"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("board")


@pytest.fixture
def config(make_config, place):
    """A finished run of one stage, trained once."""
    made = make_config(
        "stages=[{resolution: 8, kimg: 0.08, batch: 8, lr: 0.003}]", run=str(place / "run")
    )
    if not made.run.exists():
        train(made)
    return made


def board(folder, *inside):
    events = EventAccumulator(
        str(folder.joinpath("tb", *inside)), size_guidance={"images": 0, "scalars": 0}
    )
    events.Reload()
    return events


def scalars(events, tag):
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_scalars_are_those_of_the_statistics(config):
    events = board(stage(config, 8))
    lines = read_stats(stage(config, 8) / "stats.jsonl")
    assert len(lines) >= 5
    for name in ("loss", "G/grad_norm", "images_per_s", "diversity"):
        expected = {line["nimg"]: line[name] for line in lines if name in line}
        assert expected
        assert dict(scalars(events, name)) == pytest.approx(expected, rel=1e-6)
        assert [step for step, _ in scalars(events, name)] == list(expected)


def test_images_are_those_of_the_folder(config):
    folder = stage(config, 8)
    (final,) = folder.glob("final_*.png")
    (real,) = folder.glob("real_*.png")
    samples = sorted((folder / "samples").glob("*.png"))
    training, end = board(folder), board(folder, "final")
    for events, tag, paths in (
        (end, "final", [final]),
        (end, "real", [real]),
        (training, "samples", samples),
    ):
        shown = events.Images(tag)
        assert len(shown) == len(paths)
        for image, path in zip(shown, paths, strict=True):
            pixels = np.asarray(Image.open(io.BytesIO(image.encoded_image_string)))
            assert np.array_equal(pixels, np.asarray(Image.open(path).convert("RGB")))
    assert [image.step for image in training.Images("samples")] == [int(p.stem) for p in samples]


def hyperparameters(events):
    """{name: value} of a run."""
    found = events.PluginTagToContent(metadata.PLUGIN_NAME)
    assert set(found) == HPARAMS
    start = metadata.parse_session_start_info_plugin_data(found["_hparams_/session_start_info"])
    return {name: getattr(value, value.WhichOneof("kind")) for name, value in start.hparams.items()}


def test_hparams_stand_with_the_final_values(config):
    folder = stage(config, 8)
    events = board(folder, "final")
    values = hyperparameters(events)
    assert values["family.name"] == "guided" and values["family.z_dim"] == 8
    assert (values["stage.lr"], values["stage.batch"], values["seed"]) == (0.003, 8, 0)
    assert values["optim.betas"] == "[0.9, 0.99]"
    assert "RANDOM" in values["guide"]
    assert not any(name.startswith("augment") for name in values)  # all of it is off
    result = json.loads((folder / "result.json").read_text())
    tags = events.Tags()["scalars"]
    assert {"final/loss", "final/images_per_s", "final/diversity"} <= set(tags)
    for tag in tags:
        ((step, value),) = scalars(events, tag)
        assert step == result["nimg"] == 80
        assert value == pytest.approx(result[tag.removeprefix("final/")], rel=1e-6)


def test_what_is_measured_later_takes_its_place(config, tmp_path):
    """Again after evaluation and `look`: one set of hparams, the new values, the images."""
    place = Run.of(config.model_copy(update={"run": tmp_path})).stage(8)
    folder = tmp_path / "8x8"
    (folder / "visualizations").mkdir(parents=True)
    result = {"nimg": 80, "loss": 0.5, "files": {}}
    (folder / "result.json").write_text(json.dumps(result))
    fid = MetricValue("fid", 41.5, 0.5, "lower", 100, 50, "abc")
    for nimg, value in ((40, 60.0), (80, 50.0)):
        line = {"nimg": nimg, "metrics": {"fid": replace(fid, value=value).to_dict()}}
        with (folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
    write_summary(place)
    before = board(folder, "final")
    assert scalars(before, "final/fid") == [(80, 50.0)]
    assert before.Tags()["images"] == []

    kid = MetricValue.missing("kid", "lower", "no weights")
    evaluation = {
        "nimg": 80,
        "metrics": {"held_out/mse": 0.25, "probe/diversity": None},
        "measured": {"fid": fid.to_dict(), "kid": kid.to_dict()},
    }
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    Image.new("RGB", (4, 4), "red").save(folder / "visualizations" / "grid16.png")
    visuals = {
        "grid16": {"file": "grid16.png", "nimg": 80},
        "psi": {"file": None, "reason": "does not truncate", "nimg": 80},
    }
    (folder / "visualizations" / "visualizations.json").write_text(json.dumps(visuals))
    write_summary(place)
    after = board(folder, "final")
    assert len(list((folder / "tb" / "final").iterdir())) == 1
    assert hyperparameters(after) == hyperparameters(before)
    assert after.Tags()["scalars"] == ["final/loss", "final/fid", "final/held_out/mse"]
    assert scalars(after, "final/fid") == [(80, 41.5)]
    assert scalars(after, "final/held_out/mse") == [(80, 0.25)]
    assert after.Tags()["images"] == ["visualizations/grid16"]

    (folder / "evaluation.json").write_text(json.dumps(evaluation | {"nimg": 40}))
    write_summary(place)
    assert scalars(board(folder, "final"), "final/fid") == [(80, 50.0)]


def test_an_unfinished_stage_has_no_summary(config, tmp_path):
    write_summary(Run.of(config.model_copy(update={"run": tmp_path})).stage(8))
    assert list(tmp_path.iterdir()) == []


def test_every_chart_of_the_layout_finds_what_it_shows(config):
    events = board(stage(config, 8))
    (event,) = events.Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    charts = {
        category.title: {chart.title: list(chart.multiline.tag) for chart in category.chart}
        for category in layout.category
    }
    first = next(iter(charts.values()))
    assert next(iter(charts)) == "At a glance"
    assert set(first) == {"loss", "diversity", "images/s"}
    tags = events.Tags()["scalars"]
    for category, inner in charts.items():
        for chart, patterns in inner.items():
            shown = [tag for tag in tags for pattern in patterns if re.match(pattern, tag)]
            assert shown, (category, chart)
            assert category == "Gradient norms" or not any("grad_norm" in tag for tag in shown)
    assert first["loss"] == ["loss$", "floor$"]


@pytest.fixture
def address(config):
    """Of a TensorBoard of the run."""
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(config.run)]
    command += ["--host", "127.0.0.1", "--port", "0", "--reload_interval", "1"]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    ) as process:
        try:
            said = []
            for line in process.stderr:
                said.append(line)
                found = re.search(r"http://127\.0\.0\.1:\d+/", line)
                if found:
                    yield found.group()
                    break
            else:
                pytest.fail("".join(said))
        finally:
            process.terminate()


def test_a_browser_shows_scalars_images_and_hparams(config, address, tmp_path):
    with open_browser() as browser:
        page = browser.new_page(viewport={"width": 1400, "height": 900})
        page.set_default_timeout(60_000)
        asked = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(f"{address}#timeseries")
        page.get_by_text("images_per_s", exact=True).first.wait_for()
        page.goto(f"{address}#images")
        page.locator("tf-image-loader img").first.wait_for()
        page.goto(f"{address}#hparams")
        page.get_by_text("stage.lr").first.wait_for()
        page.get_by_text("final/loss").first.wait_for()
        page.goto(f"{address}#custom_scalars")
        page.get_by_text("At a glance").first.wait_for()
        page.get_by_text("images/s", exact=True).first.wait_for()
        page.screenshot(path=tmp_path / "custom_scalars.png")
        own = (address, "blob:", "data:")
        assert [url for url in asked if not url.startswith(own)] == []
