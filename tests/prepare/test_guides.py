"""Several guides, an embedder and captions: in one pass, in steps, interrupted, and compared."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
import typer
from typer.testing import CliRunner

from dinogen.errors import UserError
from dinogen.features import native_pyramid, pooled_pyramid
from dinogen.prepare import join, pipeline
from dinogen.prepare import pyramid as pyramid_module
from dinogen.prepare.export_pt import export_pt
from dinogen.prepare.faces.folder import write_faces
from dinogen.prepare.parts import PartFiles, write_pyramids
from dinogen.prepare.photos.read import PrepareError
from launch.cli import prepare as commands
from launch.cli.shards import app as shards_app
from shards import open_dataset
from shards.check.verify import verify
from shards.image.decode import decode_image
from tests.prepare.several_guides import (
    CAPTIONS,
    NUM,
    Embedder,
    PatchGuide,
    all_samples,
    contents,
    fill,
    maker_of,
    photos_as_faces,
    settings,
)


@pytest.fixture
def photos(tmp_path):
    return fill(tmp_path / "photos")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted preparation of the same photos, and who made it."""
    folder = tmp_path_factory.mktemp("whole")
    maker = maker_of()
    pipeline.prepare(fill(folder / "photos"), folder / "data", settings(), maker)
    return folder / "data", maker


def test_every_level_is_that_of_the_photo_alone(whole):
    data, maker = whole
    samples = all_samples(data)
    assert len(samples) == NUM
    levels = {f"{g}{k}{n}" for g in ("", "pixels.", "wide.") for k in "pn" for n in (4, 8)}
    for sample in samples:
        assert set(sample.levels) == levels | {"clip", "text"}
        pixels = decode_image(sample.image, sample.image_format).astype(np.float32)
        images = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 127.5 - 1
        for prefix, guide in (("", maker.guide), *((f"{n}.", g) for n, g in maker.guides.items())):
            made = {"p": pooled_pyramid(guide, images, (4, 8), 8)}
            made["n"] = native_pyramid(guide, images, (4, 8))
            for kind, pyramid in made.items():
                for grid, expected in pyramid.items():
                    found = sample.levels[f"{prefix}{kind}{grid}"]
                    np.testing.assert_allclose(found, expected[0], rtol=1e-3, atol=1e-3)
        clip = maker.embedder.images(images)
        np.testing.assert_allclose(sample.levels["clip"], clip, rtol=1e-3, atol=1e-3)
    assert verify(open_dataset(data)) == []


def test_captions_go_with_their_photos_and_the_others_have_zeros(whole):
    stripped = {f"f{number:02d}": text.strip() for number, text in CAPTIONS.items()}
    for sample in all_samples(whole[0]):
        assert sample.caption == stripped.get(sample.key)
        text = np.zeros((1, 6))
        if sample.caption:
            text = [[len(sample.caption), ord(sample.caption[0]), 1, 2, 3, 4]]
        np.testing.assert_array_equal(sample.levels["text"], text)


def test_the_manifest_says_who_made_what_and_from_which_grid(whole):
    data, maker = whole
    manifest = open_dataset(data).manifest
    assert manifest.guide == maker.guide.info.to_dict()
    assert manifest.guides == {n: g.info.to_dict() for n, g in maker.guides.items()}
    assert manifest.clip == {**maker.embedder.info, "mean": [0.5, 0.25]}
    assert manifest.prepare["pyramids"] == {
        "grids": [4, 8], "kinds": ["pooled", "native"], "base_grid": 8,
        "resize": "bicubic antialias",
    }  # fmt: skip
    said = CliRunner().invoke(shards_app, ["ls", str(data)], env={"COLUMNS": "250"}).output
    assert "wide.n8" in said and "guide wide: name=dinov2" in said and "clip: name=clip" in said


def test_each_photo_is_decoded_once_and_each_guide_asked_once_per_grid(photos, monkeypatch):
    decoded = Counter()
    original = pyramid_module._decode
    monkeypatch.setattr(
        pyramid_module, "_decode", lambda crop: (decoded.update([crop.key]), original(crop))[1]
    )
    maker = maker_of()
    pipeline.prepare(photos, photos.parent / "data", settings(), maker)
    assert set(decoded.values()) == {1} and len(decoded) == NUM
    # 3 batches of 4: pooled at 8, native at 8 and 4.
    for guide, side in ((maker.guide, 3), (maker.guides["wide"], 2)):
        assert guide.calls == {(4, 3, side * 8, side * 8): 6, (4, 3, side * 4, side * 4): 3}
    assert len(maker.embedder.seen) == len(CAPTIONS)


def test_one_pass_gives_the_bytes_of_the_three_steps(photos, whole, tmp_path):
    faces, parts, data = (tmp_path / name for name in ("faces", "parts", "data"))
    config = settings()
    write_faces(photos, faces, config.faces)
    assert {p.stem for p in faces.glob("*.txt")} == {f"f{number:02d}" for number in CAPTIONS}
    write_pyramids(faces, parts, maker_of())
    source = join.open_pyramids(parts)
    join.pack_faces(faces, source, data, config.pack, join.guide_of(source, None))
    assert contents(data) == contents(whole[0])
    # and again: skipped
    assert write_pyramids(faces, parts, maker_of()).num_kept == 4
    join.pack_faces(faces, source, data, config.pack, join.guide_of(source, None))


class Killed(BaseException):
    pass


@pytest.mark.parametrize("after", [2, 6, 9])
def test_interrupted_and_resumed_gives_the_same_bytes(photos, whole, tmp_path, after):
    def kill(done, total):
        if done > after:
            raise Killed

    data = tmp_path / "data"
    with pytest.raises(Killed):
        pipeline.prepare(photos, data, settings(), maker_of(), progress=kill)
    pipeline.prepare(photos, data, settings(), maker_of())
    assert contents(data) == contents(whole[0])


def test_parts_interrupted_and_resumed_are_the_same(photos, tmp_path):
    def kill(done, total):
        if done > 4:
            raise Killed

    with pytest.raises(Killed):
        write_pyramids(photos_as_faces(photos), tmp_path / "a", maker_of(), progress=kill)
    write_pyramids(photos, tmp_path / "a", maker_of())
    write_pyramids(photos, tmp_path / "b", maker_of())
    assert {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()} == {
        p.name: p.read_bytes() for p in (tmp_path / "b").iterdir()
    }
    parts = PartFiles(tmp_path / "a")
    assert len(parts.levels("f04")) == 14 and set(parts.guides) == {"pixels", "wide"}


CHANGES = [
    ({"guides": {"wide": PatchGuide(2, 4)}}, None),
    ({"guides": {}}, None),
    ({"embedder": None}, None),
    ({"embedder": Embedder(path="elsewhere")}, None),
    ({"embedder": Embedder(weights="f")}, r"clip: here, now here"),
    ({"guides": {"wide": PatchGuide(4, 4)}}, r"guides\.wide: .*patch2.*layer \[1, 2\], now"),
    ({"guides": {"more": PatchGuide(2, 4)}}, r"guides\.more: none, now .*patch2"),
    ({"guide": PatchGuide(2, 4)}, r"guide: .*patch3"),
]


@pytest.mark.parametrize(("changes", "message"), CHANGES)
def test_a_finished_dataset_is_held_against_all_that_is_asked_for(whole, changes, message):
    """One with more guides does where fewer are asked for."""
    data = whole[0]
    before = contents(data)
    photos = data.parent / "photos"
    if message is None:
        _, manifest = pipeline.prepare(photos, data, settings(), maker_of(**changes))
        assert set(manifest.guides) == {"pixels", "wide"}
    else:
        with pytest.raises(PrepareError, match=message):
            pipeline.prepare(photos, data, settings(), maker_of(**changes))
    assert contents(data) == before


def test_a_finished_dataset_of_another_base_grid_is_another(whole):
    config = settings(pyramids={"base_grid": 16})
    with pytest.raises(PrepareError, match=r"prepare\.pyramids\.base_grid: 8, now None"):
        pipeline.prepare(
            whole[0].parent / "photos", whole[0], config, maker_of(config=config.pyramids)
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"guides": {"wide": PatchGuide(2, 4)}}, r"guides\.pixels: pixels \(RGB\) layer -1, now"),
        ({"embedder": Embedder(weights="f")}, r"clip: here, now here"),
        ({"embedder": None}, r"clip: here, now none"),
        (
            {"config": settings(pyramids={"base_grid": 16}).pyramids},
            r"base_grid: 8, now None",
        ),
        ("no captions", r"captions: none now"),
    ],
)
def test_parts_of_other_guides_are_never_mixed(photos, tmp_path, changes, message):
    photos_as_faces(photos)
    write_pyramids(photos, tmp_path / "out", maker_of())
    if changes == "no captions":
        for path in photos.glob("*.txt"):
            path.unlink()
    changes = {} if isinstance(changes, str) else changes
    with pytest.raises(PrepareError, match=message):
        write_pyramids(photos, tmp_path / "out", maker_of(**changes))


def test_a_changed_caption_is_embedded_again_alone(photos, tmp_path):
    photos_as_faces(photos)
    write_pyramids(photos, tmp_path / "out", maker_of())
    (photos / "f04.txt").write_text("another")
    maker = maker_of()
    summary = write_pyramids(photos, tmp_path / "out", maker)
    assert (summary.num_done, summary.num_kept) == (1, 3)
    assert maker.embedder.seen == ["another"]
    write_pyramids(photos, tmp_path / "fresh", maker_of())
    for part in (tmp_path / "fresh").iterdir():
        assert part.read_bytes() == (tmp_path / "out" / part.name).read_bytes()


def test_export_gives_the_main_guide_alone(whole, tmp_path):
    config = settings(pyramids={"grids": [4, 8, 16], "base_grid": 16})
    photos = fill(tmp_path / "photos")
    pipeline.prepare(photos, tmp_path / "data", config, maker_of(config=config.pyramids))
    assert export_pt(tmp_path / "data", tmp_path / "pt") == NUM
    pyramid = torch.load(tmp_path / "pt" / "f03.pt", weights_only=True)
    assert pyramid["8x8"].shape == (1, 64, 5)


def test_from_the_command_line(photos, tmp_path):
    def dinogen(*arguments):
        app = typer.Typer()
        commands.register(app)
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    changes = ["guide.name=pixels", "guides.again.name=pixels", "prepare.faces.detect=none"]
    changes += ["prepare.faces.size=32", "prepare.pyramids.grids=[8]"]
    done = dinogen("prepare", photos, tmp_path / "data", *changes)
    assert done.exit_code == 0, done.output
    assert "again.n8: 3 channels" in done.output
    data = open_dataset(tmp_path / "data")
    batch = data.read(range(3), levels=["n8", "again.n8"], image_size=8)
    native = batch["guides"]["again"][8].float().transpose(1, 2).reshape(3, 3, 8, 8)
    assert torch.equal(batch["guides"]["again"][8], batch["pyramid"][8])
    # The stored photo's own 8x8, which Pillow rounds to 256 levels.
    assert (native - batch["image"]).abs().max() <= 1.1 / 127.5
    missing = dinogen("prepare", photos, tmp_path / "x", *changes, "guides.b.path=/nowhere")
    assert isinstance(missing.exception, UserError)
    assert "guides.b.path: /nowhere" in str(missing.exception)
    no_parts = dinogen("pack", photos, tmp_path / "x", "clip.path=/nowhere")
    assert "whose embeddings dinogen pyramids computes" in str(no_parts.exception)
