"""dinogen look: what the images show is what they say, and what is missing is said."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from dinogen.errors import UserError
from dinogen.report.images import to_uint8
from dinogen.training.checkpointing.snapshot import load_snapshot
from dinogen.training.run import train
from dinogen.visualize import drawings
from dinogen.visualize.drawings import History
from dinogen.visualize.look import write_visualizations
from dinogen.visualize.scene import LeftOut, Scene
from launch.cli.main import app
from tests.families.tiny import RESOLUTION

from .visualizations import alike, images_of

ALL = {
    "grid16",
    "grid64",
    "progression",
    "progression_animated",
    "interpolation_linear",
    "interpolation_spherical",
    "psi",
    "styles",
    "directions",
    "reconstructions",
    "variations",
    "worst",
    "neighbours",
}


@pytest.fixture(scope="module")
def sampled(scene_of):
    """The first images, 16 at most, that `dinogen sample` makes of a scene."""
    found = {}

    def make(family, num):
        if family not in found:
            scene = scene_of(family)
            found[family] = to_uint8(scene.snapshot.sample(16, scene.seed).numpy()).astype(int)
        return found[family][:num]

    return make


def test_the_great_circle():
    a, b = torch.eye(6)[None, 0], torch.eye(6)[None, 3]
    half = drawings.spherical(a, b, 0.5)
    torch.testing.assert_close(half, (a + b) / 2**0.5)
    third = drawings.spherical(a, b, 1 / 3)
    torch.testing.assert_close(third, a * 0.75**0.5 + b * 0.5)
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 5, 3, 4, 4, generator=generator)
    torch.testing.assert_close(drawings.spherical(x, y, 0.0), x)
    torch.testing.assert_close(drawings.spherical(x, y, 1.0), y)
    y = y * (x.flatten(1).norm(dim=1) / y.flatten(1).norm(dim=1)).view(5, 1, 1, 1)
    for t in (0.2, 0.5, 0.9):
        moved = drawings.spherical(x, y, t)
        torch.testing.assert_close(moved.flatten(1).norm(dim=1), x.flatten(1).norm(dim=1))
        alone = drawings.spherical(x[2:3], y[2:3], t)
        torch.testing.assert_close(alone[0], moved[2])
    torch.testing.assert_close(drawings.spherical(x, x, 0.3), x)


def test_main_directions_are_the_eigenvectors_of_the_gram_matrix():
    matrix = torch.randn(40, 7, generator=torch.Generator().manual_seed(0))
    values, vectors = np.linalg.eigh((matrix.T @ matrix).numpy().astype(np.float64))
    found = drawings.main_directions(matrix, 3).numpy()
    for number in range(3):
        expected = vectors[:, -1 - number]
        assert abs(found[number] @ expected) == pytest.approx(1, abs=1e-5)
        assert found[number][np.abs(found[number]).argmax()] > 0
    assert values[-1] > values[-2] > values[-3]


@pytest.mark.parametrize("family", ["stylegan2_ada", "vae", "ddpm"])
def test_grids_and_the_ends_of_interpolations_are_samples(family, scene_of, sampled):
    scene = scene_of(family)
    samples = sampled(family, 16)
    alike(images_of(drawings.grid16(scene)), samples)
    grid = images_of(drawings.grid64(scene))
    assert len(grid) == 64
    alike(grid[:16], samples)
    for maker in (drawings.interpolation_linear, drawings.interpolation_spherical):
        drawing = maker(scene)
        strips = images_of(drawing).reshape(4, drawing.sheets[0].columns, RESOLUTION, RESOLUTION, 3)
        alike(strips[:, 0], samples[0:8:2])
        alike(strips[:, -1], samples[1:8:2])
        middle = strips[:, 4]
        for end in (samples[0:8:2], samples[1:8:2]):
            assert np.abs(middle - end).max() > 1
    latents = scene.latents(torch.arange(2))
    between = scene.decode(latents.mean(0, keepdim=True), torch.zeros(1, dtype=torch.int64))
    linear = images_of(drawings.interpolation_linear(scene))[4:5]
    alike(linear, to_uint8(between.numpy()).astype(int))


def test_psi_goes_from_the_mean_to_the_samples(scene_of, sampled):
    scene = scene_of("stylegan2_ada")
    drawing = drawings.psi(scene)
    table = images_of(drawing).reshape(4, -1, RESOLUTION, RESOLUTION, 3)
    assert drawing.sheets[0].labels[0] == "psi 0" and drawing.sheets[0].labels[-1] == "psi 1"
    alike(table[:, 0], np.broadcast_to(table[:1, 0], table[:, 0].shape))
    alike(table[:, -1], sampled("stylegan2_ada", 4))


def test_styles_stand_below_and_beside_what_they_come_from(scene_of, sampled):
    scene = scene_of("stylegan2_ada")
    drawing = drawings.styles(scene)
    table = images_of(drawing).reshape(5, 7, RESOLUTION, RESOLUTION, 3)
    samples = sampled("stylegan2_ada", 10)
    assert (table[0, 0] == 255).all()
    alike(table[1:, 0], samples[:4])
    alike(table[0, 1:], samples[4:])
    z = scene.latents(torch.tensor([2, 8]))
    with torch.no_grad():
        one = scene.family.mix(scene.networks, z[:1], z[1:], torch.tensor([2]), scene.seed)
    alike(table[3, 5], to_uint8(one.numpy())[0].astype(int))


def test_directions_pass_through_the_samples(scene_of, sampled):
    drawing = drawings.directions(scene_of("vae"))
    table = images_of(drawing).reshape(4, 2, 9, RESOLUTION, RESOLUTION, 3)
    samples = sampled("vae", 2)
    for row in table:
        alike(row[:, 4], samples)
    assert drawing.sheets[0].labels == ["-4", "-3", "-2", "-1", "0", "+1", "+2", "+3", "+4"]
    assert list(drawing.sheets[0].left)[:3] == ["1 a", "1 b", "2 a"]


def test_what_a_family_does_not_have_is_left_out(scene_of):
    for maker in (drawings.psi, drawings.styles):
        with pytest.raises(LeftOut):
            maker(scene_of("vae"))
    with pytest.raises(LeftOut, match="not a vector"):
        drawings.directions(scene_of("ddpm"))
    with pytest.raises(LeftOut, match="encodes no"):
        drawings.reconstructions(scene_of("ddpm"))
    with pytest.raises(LeftOut, match="no images from features"):
        drawings.variations(scene_of("ddpm"))
    with pytest.raises(LeftOut, match="no images from features"):
        drawings.variations(scene_of("vae"))


def test_progression_shows_the_same_latents_at_each_checkpoint(scene_of, runs, sampled):
    scene = scene_of("stylegan2_ada")
    history = History(scene)
    drawing = history.progression(scene)
    assert list(history.images) == [8, 16, 24, 32]
    num_train = scene.data.num_samples()
    expected = [f"{nimg / num_train:.1f} epochs" for nimg in (8, 16, 24, 32)]
    assert list(drawing.sheets[0].labels) == expected
    table = images_of(drawing).reshape(6, 4, RESOLUTION, RESOLUTION, 3)
    alike(table[:, 3], sampled("stylegan2_ada", 6))
    then = load_snapshot(runs("stylegan2_ada"), nimg=16).sample(6, 5)
    alike(table[:, 1], to_uint8(then.numpy()).astype(int))
    assert len(history.animation(scene).sheets) == 4

    early = Scene(load_snapshot(runs("stylegan2_ada"), nimg=24), 5)
    assert list(History(early).images) == [8, 16, 24], "nothing of what came later"
    with pytest.raises(LeftOut, match="keep_every_kimg"):
        History(scene_of("ddpm")).progression(scene_of("ddpm"))


def test_everything_is_written_and_said(runs, tmp_path):
    run = runs("stylegan2_ada")
    result = CliRunner().invoke(app, ["look", str(run), "--seed", "5"])
    assert result.exit_code == 0, result.output
    folder = run / "16x16" / "visualizations"
    entries = json.loads((folder / "visualizations.json").read_text())
    assert set(entries) == ALL
    for name, entry in entries.items():
        assert (entry["nimg"], entry["seed"]) == (32, 5)
        assert entry["command"] == f"dinogen look {run} --stage 16 --nimg 32 --seed 5"
        if name == "reconstructions":
            assert entry["file"] is None and "encodes" in entry["reason"]
            continue
        if name == "variations":
            assert entry["file"] is None and "from features" in entry["reason"]
            continue
        with Image.open(folder / entry["file"]) as image:
            assert image.format == ("GIF" if name == "progression_animated" else "PNG")
        assert entry["caption"].endswith(".")
    assert entries["progression_animated"]["file"] == "progression.gif"
    written = {path.name for path in folder.iterdir()}
    assert written == {e["file"] for e in entries.values() if e["file"]} | {"visualizations.json"}
    assert "reconstructions is left out: this family encodes no images" in result.output

    before = (folder / "grid16.png").read_bytes()
    other = write_visualizations(run, nimg=16, seed=6, out=tmp_path / "some where")
    assert other == tmp_path / "some where" / "visualizations.json"
    assert json.loads(other.read_text())["psi"]["command"] == (
        f"dinogen look {run} --stage 16 --nimg 16 --seed 6 --out '{tmp_path / 'some where'}'"
    )
    assert (other.parent / "grid16.png").read_bytes() != before
    assert (folder / "grid16.png").read_bytes() == before


def test_without_its_data_a_run_still_shows_what_it_makes(runs, tmp_path):
    run = shutil.copytree(runs("vae"), tmp_path / "run")
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace(f"{runs('vae').parent}/data", "gone"))
    entries = json.loads(write_visualizations(run).read_text())
    for name in ("reconstructions", "worst", "neighbours"):
        assert entries[name]["file"] is None
        assert "gone" in entries[name]["reason"]
    assert {n for n, e in entries.items() if e["file"]} == ALL - {
        "reconstructions",
        "variations",
        "worst",
        "neighbours",
        "psi",
        "styles",
    }
    assert (
        "k images"
        in History(Scene(load_snapshot(run), 0))
        .progression(Scene(load_snapshot(run), 0))
        .sheets[0]
        .labels[0]
    )


def test_a_random_guide_marks_every_file(make_config):
    config = make_config("stages.1.kimg=0.08", "stages.0.kimg=0.04")
    train(config)
    entries = json.loads(write_visualizations(config.run).read_text())
    files = {entry["file"] for entry in entries.values() if entry["file"]}
    assert len(files) >= 6
    assert all(".random-guide." in file for file in files)
    assert (config.run / "8x8" / "visualizations" / "grid64.random-guide.png").is_file()
    small = write_visualizations(config.run, resolution=4)
    assert small.parent.parent.name == "4x4"


def test_no_run_is_one_clear_line(tmp_path):
    with pytest.raises(UserError, match="no run here"):
        write_visualizations(tmp_path)
