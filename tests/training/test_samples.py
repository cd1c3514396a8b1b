"""`dinogen sample`: its options, what its PNGs say, and exported files in place of a run."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from dinogen.errors import UserError
from dinogen.families.registry import family_class
from dinogen.report.images import to_uint8, with_watermark
from dinogen.serve.gallery import Gallery, Query
from dinogen.training.checkpointing.checkpoint import Checkpoint
from dinogen.training.checkpointing.export import INTENDED_USE, export, load_generator
from dinogen.training.checkpointing.snapshot import Ema, Snapshot, load_snapshot
from dinogen.training.run import train
from dinogen.visualize import samples
from launch.cli.main import app
from tests.families.conftest import disc_data  # noqa: F401 - a fixture
from tests.families.tiny import RESOLUTION, tiny_config

FAMILIES = ("stylegan2_ada", "ddpm", "dcgan")


@pytest.fixture(scope="module")
def places(disc_data, tmp_path_factory):  # noqa: F811
    """By family, a run and its exported file, in a folder of its own."""
    found = {}
    for family in FAMILIES:
        folder = tmp_path_factory.mktemp(family)
        config = tiny_config(family, disc_data, folder / "run", "stages.0.kimg=0.008")
        train(config)
        found[family] = config.run, export(config.run, folder / "G.safetensors").path
    return found


def command(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def drawn(folder):
    files = sorted(folder.glob("0*.png"))
    return [np.asarray(Image.open(file)) for file in files], [Image.open(f).text for f in files]


def test_a_png_says_where_it_comes_from(places, tmp_path):
    run, _ = places["dcgan"]
    assert command("sample", run, "--num", 3, "--seed", 4, "--out", tmp_path).exit_code == 0
    images, texts = drawn(tmp_path)
    about = [json.loads(text["dinogen"]) for text in texts]
    assert [one["number"] for one in about] == [0, 1, 2]
    assert about[0]["seed"] == 4 and about[0]["run"] == "run" and about[0]["nimg"] == 8
    assert about[0]["generated"] is True
    grid = json.loads(Image.open(tmp_path / f"grid_{RESOLUTION}x{RESOLUTION}.png").text["dinogen"])
    again = tmp_path / "again"
    words = grid["command"].split()[1:]
    assert command(*words, "--out", again).exit_code == 0
    for first, second in zip(images, drawn(again)[0], strict=True):
        assert np.array_equal(first, second)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_gives_the_images_of_its_run(places, tmp_path, family):
    run, file = places[family]
    for name, place in [("run", run), ("file", file)]:
        assert command("sample", place, "--num", 2, "--out", tmp_path / name).exit_code == 0
    for first, second in zip(drawn(tmp_path / "run")[0], drawn(tmp_path / "file")[0], strict=True):
        assert np.array_equal(first, second)


def test_a_file_is_measured_drawn_and_served(places):
    _, file = places["dcgan"]
    results = file.with_name("G-exported")
    done = command("evaluate", file, "--metrics", "spectrum", "--num-samples", 4)
    assert done.exit_code == 0, done.output
    evaluation = results / f"{RESOLUTION}x{RESOLUTION}" / "evaluation.json"
    assert json.loads(evaluation.read_text())["nimg"] == 8
    assert str(evaluation) in done.output.replace("\n", "")
    assert command("look", file).exit_code == 0
    assert (evaluation.parent / "visualizations" / "grid16.png").is_file()
    gallery = Gallery(file)
    assert list(gallery.stages) == [RESOLUTION]
    assert gallery.draw(Query(seed=3)) == gallery.draw(Query(seed=3))
    error = command("evaluate", file, "--stage", 64).exception
    assert isinstance(error, UserError) and "leave out --stage" in str(error)


def test_an_earlier_file_without_card_and_data_is_read(places, tmp_path):
    run, file = places["dcgan"]
    with safe_open(file, "pt") as opened:
        info = json.loads(opened.metadata()["dinogen"])
    for key in ("card", "data", "loss"):
        del info[key]
    earlier = tmp_path / "earlier.safetensors"
    save_file(load_file(file), earlier, {"dinogen": json.dumps(info)})
    expected = load_snapshot(run).sample(2, 0)
    assert torch.equal(load_generator(earlier).sample(2, 0), expected)
    assert command("sample", earlier, "--num", 1).exit_code == 0
    assert (tmp_path / "earlier-exported" / "samples").is_dir()


def test_the_card(places, tmp_path):
    run, file = places["dcgan"]
    card = load_generator(file).info["card"]
    assert card["intended_use"] == INTENDED_USE and card["metrics"] == {}
    command("evaluate", run, "--metrics", "spectrum", "--num-samples", 4)
    out = tmp_path / "G.safetensors"
    done = command("export", run, out, "--licence", "CC-BY-4.0", "--intended-use", "a test")
    assert done.exit_code == 0, done.output
    card = load_generator(out).info["card"]
    assert (card["licence"], card["intended_use"]) == ("CC-BY-4.0", "a test")
    measured = load_snapshot(run).place.evaluation["measured"]["spectrum"]
    if measured["value"] is not None:
        assert card["metrics"]["spectrum"]["value"] == measured["value"]


def test_psi_moves_towards_the_mean(places, tmp_path):
    run, _ = places["stylegan2_ada"]
    assert command("sample", run, "--num", 2, "--psi", 0, "--out", tmp_path).exit_code == 0
    first, second = drawn(tmp_path)[0]
    assert np.array_equal(first, second)


def test_steps_and_sampler_are_those_of_a_config(places, tmp_path):
    run, _ = places["ddpm"]
    words = ("--num", 2, "--steps", 2, "--sampler", "ddpm", "--out", tmp_path)
    assert command("sample", run, *words).exit_code == 0
    snapshot = load_snapshot(run)
    snapshot.family.options = type(snapshot.family).Options(
        **snapshot.family.options.model_dump() | {"sample_steps": 2, "sampler": "ddpm"}
    )
    expected = to_uint8(snapshot.sample(2, 0).numpy())
    assert all(np.array_equal(a, b) for a, b in zip(drawn(tmp_path)[0], expected, strict=True))


def test_a_class_alone(disc_data, tmp_path, monkeypatch):  # noqa: F811
    """Image i of class c is the sample of number i * num_classes + c."""
    config = tiny_config("ddpm", disc_data, tmp_path / "run", "family.num_classes=3")
    family = family_class(config.family)(config, config.stages[0], torch.device("cpu"))
    ema = Ema({"G": family.networks["G"]}, config.ema)
    checkpoint = Checkpoint(tmp_path, {"facts": {}})
    snapshot = Snapshot(RESOLUTION, 8, family, ema, "", 1.0, False, checkpoint)
    monkeypatch.setattr(samples, "load_snapshot", lambda *_: snapshot)
    samples.write_samples(samples.SampleRequest(tmp_path, 2, label=1), tmp_path / "one")
    expected = to_uint8(snapshot.sample(5, 0).numpy())[[1, 4]]
    images, texts = drawn(tmp_path / "one")
    assert all(np.array_equal(a, b) for a, b in zip(images, expected, strict=True))
    assert [json.loads(text["dinogen"])["number"] for text in texts] == [1, 4]
    with pytest.raises(UserError, match="--class 3: classes are 0 to 2"):
        samples.write_samples(samples.SampleRequest(tmp_path, 2, label=3), tmp_path / "two")


@pytest.mark.parametrize(
    ("family", "words", "message"),
    [
        ("dcgan", ("--psi", 0.5), "--psi: family dcgan does not truncate"),
        ("dcgan", ("--class", 0), "--class: family dcgan, as it was trained, has no classes"),
        ("dcgan", ("--steps", 3), "--steps: family dcgan does not sample in steps"),
        ("stylegan2_ada", ("--sampler", "ddim"), "--sampler: family stylegan2_ada does not"),
        ("stylegan2_ada", ("--guidance", 2), "--guidance: family stylegan2_ada has neither"),
        ("ddpm", ("--guidance", 2), "guidance 2.0 needs classes"),
        (
            "ddpm",
            ("--sampler", "euler"),
            "sampler euler belongs to prediction: edm",
        ),
        ("ddpm", ("--steps", 51), "sample_steps 51 are more than num_steps 50"),
        ("dcgan", ("--watermark", "generated"), "cannot be read on 16x16 pixels"),
    ],
)
def test_what_a_family_cannot_do_is_one_error(places, tmp_path, family, words, message):
    error = command("sample", places[family][0], "--out", tmp_path, *words).exception
    assert isinstance(error, UserError)
    assert re.search(message, str(error)), error
    assert not list(tmp_path.iterdir())


def test_a_watermark_is_light_letters_along_the_lower_edge():
    grey = np.full((2, 64, 64, 3), 128, np.uint8)
    marked = with_watermark(grey, "generated")
    assert np.array_equal(marked[0], marked[1])
    assert (marked[:, :48] == 128).all()
    assert marked[:, 48:].max() > 200 and marked[:, 48:].min() < 60
