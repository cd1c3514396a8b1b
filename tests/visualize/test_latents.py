"""Projected photos drawn again, with mixed layers, and along directions."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from dinogen.errors import UserError
from dinogen.projection.latents import (
    decode_projected,
    read_projected,
    snapshot_of,
    write_projected,
)
from dinogen.report.images import to_uint8
from dinogen.training.checkpointing.snapshot import load_snapshot
from dinogen.visualize.latents import Mix, mixed, write_directions, write_projections
from launch.cli.main import app
from tests.projection.conftest import photos, projected  # noqa: F401


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def invoke(*words):
    done = CliRunner().invoke(app, [*map(str, words)])
    return done.exit_code, done.output, done.exception


def test_sample_draws_what_was_projected(runs, projected, tmp_path):  # noqa: F811
    place = projected("stylegan2_ada")
    out = tmp_path / "out"
    code, said, error = invoke("sample", runs("stylegan2_ada"), "--latents", place, "--out", out)
    assert (code, error) == (0, None) and "3 projected photos" in said
    files = sorted(out.glob("0*.png"))
    assert len(files) == 3
    for file, one in zip(files, read_projected([place]), strict=True):
        about = json.loads(Image.open(file).text["dinogen"])
        assert about["generated"] and about["photo"] == one.title
        assert "--latents" in about["command"]
        # the image of the projection is enlarged twelve times
        sheet = pixels(one.path.parent / "projection.png")
        left = 2 * (192 + 2)
        shown = sheet[16 + 6 : 16 + 192 : 12, left + 6 : left + 192 : 12]
        assert np.abs(shown - pixels(file)).max() <= 1


def test_each_photo_is_drawn_as_it_was_projected(runs, projected, tmp_path):  # noqa: F811
    """Whatever else is drawn with it."""
    (one, *_) = read_projected([projected("ddpm")])
    files, images = [], {}
    for steps in (2, 20):
        sampling = {"sampler": "ddim", "steps": steps}
        info = one.info | {"settings": one.settings | {"sampling": sampling}}
        files.append(tmp_path / f"{steps}.safetensors")
        write_projected(files[-1], 0.1 * one.latents, None, info)
        snapshot = load_snapshot(runs("ddpm"))
        family = snapshot.family.with_sampling(sampling)
        made = family.decode(snapshot.ema.networks, 0.1 * one.latents, torch.tensor([0]), 0)
        images[files[-1]] = to_uint8(made.clamp(-1, 1).numpy())[0]
    assert np.abs(np.diff(np.stack([*images.values()]).astype(int), axis=0)).max() > 1
    for places in (files, files[::-1]):
        write_projections(runs("ddpm"), places, out=tmp_path / "out")
        for n, file in enumerate(places):
            (drawn,) = (tmp_path / "out").glob(f"{n:05d}_*")
            assert np.array_equal(pixels(drawn), images[file])


def test_all_layers_of_a_seed_are_its_sample(runs, projected):  # noqa: F811
    run = runs("stylegan2_ada")
    (one, other, _) = read_projected([projected("stylegan2_ada")])
    snapshot, space = snapshot_of(run, [one])
    whole = mixed(snapshot, space, one, [Mix(0, 5, 7, None)])
    G = snapshot.ema.networks["G"]
    w = G.mapping(snapshot.family.latents(torch.tensor([0]), 7))
    assert torch.allclose(whole.latents, G.broadcast(w), atol=1e-6)
    part = mixed(snapshot, space, one, [Mix(2, 3, None, other.path)])
    assert torch.equal(part.latents[:, 2:4], other.latents[:, 2:4])
    assert torch.equal(part.latents[:, :2], one.latents[:, :2])
    assert torch.equal(part.latents[:, 4:], one.latents[:, 4:])
    (in_w, *_) = read_projected([projected("stylegan2_ada", "w")])
    snapshot, space = snapshot_of(run, [in_w])
    found = mixed(snapshot, space, in_w, [Mix(0, 0, 7, None)])
    assert found.space == "w+" and torch.equal(found.latents[:, 1], in_w.latents)


def test_mixing_that_is_not_possible_is_refused(runs, projected, tmp_path):  # noqa: F811
    def refused(message, family, mix, space=None):
        with pytest.raises(UserError, match=message):
            write_projections(runs(family), [projected(family, space)], [mix], out=tmp_path)

    refused("write LAYERS=SOURCE", "stylegan2_ada", "all")
    refused("has the layers 0 to 5", "stylegan2_ada", "4-6=seed:1")
    refused("has no layers that can be chosen", "dcgan", "0-1=seed:1")
    refused("^--mix: .*: is not there", "stylegan2_ada", f"0-1={tmp_path / 'gone'}")
    run, place = runs("stylegan2_ada"), projected("stylegan2_ada")
    for words, message in (
        (("--mix", "0=seed:1"), "--mix: takes the projected photos of --latents"),
        (("--latents", place, "--psi", "0.5"), "leave out --num, --seed, --text"),
        (("--latents", place, "--num", "3"), "leave out --num, --seed, --text"),
        (("--latents", place, "--seed", "3"), "leave out --num, --seed, --text"),
    ):
        code, _, error = invoke("sample", run, *words, "--out", tmp_path)
        assert code == 1 and message in str(error)
    code, _, error = invoke("look", run, "--latents", place, "--seed", 3)
    assert code == 1 and "leave out KEY=VALUE" in str(error)


@pytest.mark.parametrize(
    ("family", "space"), [("dcgan", None), ("stylegan2_ada", "w"), ("stylegan2_ada", None)]
)
def test_directions_begin_at_the_photo(family, space, runs, projected, tmp_path):  # noqa: F811
    place = projected(family, space)
    written = write_directions(runs(family), [place], out=tmp_path)
    assert len(written) == 3
    (one, *_) = read_projected([place])
    snapshot, _ = snapshot_of(runs(family), [one])
    sheet = pixels(tmp_path / one.title / "directions.png")
    tile, gap, line = 96, 2, 16
    assert sheet.shape[0] == line + 4 * (tile + gap) - gap
    margin = sheet.shape[1] - (9 * (tile + gap) - gap)
    middle = margin + 4 * (tile + gap)
    image = to_uint8(decode_projected(snapshot, one, one.latents).numpy())[0].astype(int)
    for row in range(4):
        top = line + row * (tile + gap)
        shown = sheet[top + 3 : top + tile : 6, middle + 3 : middle + tile : 6]
        assert np.abs(shown - image).max() <= 1
    first = sheet[line + 3 : line + tile : 6, margin + 3 : margin + tile : 6]
    assert np.abs(first - image).sum() > np.abs(shown - image).sum()


def test_diffusion_has_no_directions(runs, projected):  # noqa: F811
    with pytest.raises(UserError, match="there are no directions"):
        write_directions(runs("ddpm"), [projected("ddpm")])
