"""Walks as videos: decoded again and held against the generator's own images."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from PIL import Image

from dinogen.errors import UserError
from dinogen.families.abilities import to_space
from dinogen.projection.latents import FILE, read_projected, write_projected
from dinogen.projection.project import ProjectionRequest, project
from dinogen.report import video as writer
from dinogen.report.images import to_uint8
from dinogen.report.video import enlarged, tiled, write_video
from dinogen.visualize.video import VideoRequest, walk_of, write_walk
from tests.projection.conftest import photos, projected  # noqa: F401


def frames_of(path):
    """(N, H, W, 3) of a file, by ffmpeg; and its frames per second."""
    reader = imageio_ffmpeg.read_frames(str(path))
    about = next(reader)
    width, height = about["size"]
    frames = [np.frombuffer(one, np.uint8).reshape(height, width, 3) for one in reader]
    return np.stack(frames).astype(int), about


def smooth(num, side=48):
    """Frames whose colours change slowly, which any codec keeps."""
    y, x = np.mgrid[:side, :side] / side
    for n in range(num):
        yield np.stack([255 * x, 255 * y, np.full_like(x, 10 * n)], -1).astype(np.uint8)


@pytest.mark.parametrize("suffix", [".mp4", ".gif"])
def test_a_video_holds_the_frames_that_were_written(suffix, tmp_path):
    path = tmp_path / "new" / f"a{suffix}"
    assert write_video(path, smooth(12), 8) == 12
    found, about = frames_of(path)
    expected = np.stack(list(smooth(12))).astype(int)
    assert found.shape == expected.shape
    assert about["fps"] == pytest.approx(8, rel=0.05)  # a GIF counts hundredths of a second
    assert np.abs(found - expected).mean() < 4
    assert [one.name for one in path.parent.iterdir()] == [path.name]
    again = tmp_path / f"b{suffix}"
    write_video(again, smooth(12), 8)
    assert again.read_bytes() == path.read_bytes()


def test_an_mp4_is_one_that_every_player_reads(tmp_path):
    write_video(tmp_path / "a.mp4", (one[:33, :47] for one in smooth(3)), 8)
    found, about = frames_of(tmp_path / "a.mp4")
    assert (about["codec"], about["pix_fmt"].partition("(")[0]) == ("h264", "yuv420p")
    assert found.shape[1:3] == (34, 48)
    data = (tmp_path / "a.mp4").read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")  # browsers begin before they have all of it


def test_a_gif_repeats_and_keeps_time(tmp_path):
    write_video(tmp_path / "a.gif", smooth(7), 30)
    with Image.open(tmp_path / "a.gif") as gif:
        times = []
        for n in range(gif.n_frames):
            gif.seek(n)
            times.append(gif.info["duration"])
        assert gif.info["loop"] == 0
    assert sum(times) == 230 and len(times) == 7 and set(times) == {30, 40}


@pytest.mark.parametrize("suffix", [".mp4", ".gif"])
def test_a_video_that_fails_leaves_nothing(suffix, tmp_path):
    path = tmp_path / f"a{suffix}"

    def broken():
        yield from smooth(2)
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        write_video(path, broken(), 8)
    assert list(tmp_path.iterdir()) == []


_LIMITED = """
import resource, sys
from pathlib import Path
from dinogen.errors import UserError
from dinogen.report.video import write_video
from tests.visualize.test_video import smooth
resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
try:
    write_video(Path(sys.argv[1]), smooth(int(sys.argv[2]), 256), 8)
except UserError as error:
    print(error)
"""


@pytest.mark.parametrize("num", [20, 400])
def test_an_mp4_that_ffmpeg_cannot_finish_is_not_there(num, tmp_path):
    """As on a full disk, at its end and in the middle."""
    path = tmp_path / "a.mp4"
    words = [sys.executable, "-c", _LIMITED, str(path), str(num)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert f"{path}: ffmpeg failed (" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_what_ffmpeg_says_is_in_the_error(tmp_path):
    with pytest.raises(UserError, match=r"ffmpeg failed \(\w.*\)"):
        write_video(tmp_path / "a.mp4", [np.zeros((2, 2**18, 3), np.uint8)], 8)
    assert list(tmp_path.iterdir()) == []


def test_frames_are_taken_one_by_one(tmp_path):
    """None is kept: what is written of a long video takes no more memory than of a short one."""
    alive, most = set(), 0

    class Frame(np.ndarray):
        def __del__(self):
            alive.discard(id(self))

    def frames():
        nonlocal most
        for one in smooth(60, 16):
            frame = one.view(Frame)
            alive.add(id(frame))
            most = max(most, len(alive))
            yield frame

    write_video(tmp_path / "a.gif", frames(), 10)
    assert most < 6


def test_what_cannot_be_written_is_refused(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"a\.avi: a video is \.mp4 or \.gif"):
        write_video(tmp_path / "a.avi", smooth(1), 8)
    with pytest.raises(UserError, match="at most 50 frames"):
        write_video(tmp_path / "a.gif", smooth(1), 60)
    monkeypatch.setattr(writer, "can_write_mp4", lambda: False)
    with pytest.raises(UserError, match=r"pip install 'dinogen\[video\]', or choose \.gif"):
        write_video(tmp_path / "a.mp4", smooth(1), 8)


def test_tiles_and_sizes():
    images = np.arange(6 * 4 * 4 * 3, dtype=np.uint8).reshape(6, 4, 4, 3)
    table = tiled(images, 3)
    assert table.shape == (8, 12, 3)
    assert np.array_equal(table[4:, 8:], images[5])
    assert np.array_equal(enlarged(images, 8)[:, ::2, 1::2], images)
    assert enlarged(images, 6).shape == (6, 6, 6, 3)


def test_a_walk_shows_the_generators_images(runs, tmp_path):
    path = tmp_path / "walk.mp4"
    request = VideoRequest(
        runs("dcgan"), path, keys=3, seed=5, columns=2, rows=1, size=32, seconds=1.2, fps=10
    )
    done = []
    assert write_walk(request, lambda n, total: done.append((n, total))) == (path, 12)
    assert done == [(n, 12) for n in range(1, 13)]
    found, about = frames_of(path)
    assert found.shape == (12, 32, 64, 3) and about["fps"] == 10
    walk = walk_of(request)
    family, networks = walk.snapshot.family, walk.snapshot.ema.networks
    for key in range(3):  # every fourth frame is a key: samples of the seed
        numbers = torch.arange(2 * key, 2 * key + 2)
        images = to_uint8(family.sample(networks, numbers, 5).numpy())
        expected = tiled(enlarged(images, 32), 2).astype(int)
        assert np.abs(found[4 * key] - expected).mean() < 6


def test_a_loop_ends_beside_its_beginning(runs):
    request = VideoRequest(runs("dcgan"), keys=3, seconds=3, fps=10)
    walk = walk_of(request)
    latents = torch.stack([walk.at(frame)[0] for frame in range(30)])
    steps = (latents - latents.roll(1, 0)).flatten(1).norm(dim=1)
    assert steps.max() < 2 * steps.median()  # from the last to the first as between others
    lengths = latents.flatten(1).norm(dim=1)
    keys = walk.keys.flatten(1).norm(dim=1)
    assert lengths.min() > 0.7 * keys.min()  # on great circles
    straight = walk_of(dataclasses.replace(request, loop=False))
    assert torch.allclose(straight.at(0)[0], walk.keys[0], atol=1e-6)
    assert torch.allclose(straight.at(29)[0], walk.keys[2], atol=1e-6)


def test_one_frame_and_one_key(runs, tmp_path):
    request = VideoRequest(runs("dcgan"), tmp_path / "a.gif", keys=1, seconds=0.05, fps=10)
    assert write_walk(request)[1] == 1
    assert write_walk(dataclasses.replace(request, loop=False, seconds=0.5))[1] == 5


def test_walks_in_w_are_straight_and_truncated(runs):
    request = VideoRequest(runs("stylegan2_ada"), keys=2, seconds=0.4, fps=10, psi=0.5)
    walk = walk_of(request)
    G = walk.snapshot.ema.networks["G"]
    w = G.truncate(G.mapping(walk.snapshot.family.latents(torch.arange(2), 0)), 0.5)
    assert walk.space.name == "w"
    assert torch.allclose(walk.keys[:, 0], w, atol=1e-6)
    assert torch.allclose(walk.at(1)[0][0], w.mean(0), atol=1e-6)


@pytest.mark.parametrize(("layers", "still"), [("coarse", slice(3, 6)), ("fine", slice(0, 3))])
def test_half_of_the_layers_walks(layers, still, runs):
    walk = walk_of(VideoRequest(runs("stylegan2_ada"), keys=3, seconds=1, fps=9, layers=layers))
    latents = torch.stack([walk.at(frame)[0] for frame in range(9)])
    assert walk.space.name == "w+" and latents.shape[1:] == (1, 6, 8)
    same = (latents == latents[:1]).all(0)[0].all(1)
    assert same.tolist() == [number in range(6)[still] for number in range(6)]


def test_diffusion_walks_by_ddim(runs):
    walk = walk_of(VideoRequest(runs("ddpm"), keys=2, seconds=0.2, fps=10, steps=3))
    assert walk.snapshot.family.options.sampler == "ddim"
    assert walk.snapshot.family.options.sample_steps == 3
    images = list(walk.images())
    assert len(images) == 2 and images[0].shape == (1, 16, 16, 3)


def test_a_walk_between_projected_photos(runs, projected):  # noqa: F811
    place = projected("stylegan2_ada")
    request = VideoRequest(runs("stylegan2_ada"), latents=(place,), columns=2, seconds=0.6, fps=10)
    walk = walk_of(request)
    assert walk.keys.shape == (3, 2, 6, 8) and walk.noise.shape == (3, 2, 656)
    latents, noise = walk.at(2)  # the second photo, and beside it the third
    assert torch.equal(latents, walk.keys[1]) and torch.allclose(noise, walk.noise[1], atol=1e-5)
    assert torch.equal(latents[1], walk.keys[2][0])
    halves = walk_of(dataclasses.replace(request, layers="fine"))
    assert torch.equal(halves.at(2)[0][:, :3], walk.keys[0][:, :3])


def projected_alike(run, photo, out, **more):
    given = {"steps": 4, "restarts": 1, "loss": "pixels", "align": False} | more
    project(ProjectionRequest(run, (photo,), out=out, **given))
    return out


def test_a_walk_between_projections_of_other_settings_is_refused(
    runs,
    photos,  # noqa: F811
    projected,  # noqa: F811
    tmp_path,
):
    def refused(message, run, *places):
        with pytest.raises(UserError, match=message) as error:
            walk_of(VideoRequest(run, latents=places))
        assert all(str(place) in str(error.value) for place in places)

    other = projected_alike(runs("ddpm"), photos, tmp_path / "steps", steps=3)
    refused("not the same sampling", runs("ddpm"), projected("ddpm"), other)
    first = next(photos.iterdir())
    classes = [
        projected_alike(runs("ddpm_classes"), first, tmp_path / str(n), label=n) for n in (0, 1)
    ]
    refused("not the same label", runs("ddpm_classes"), *classes)
    (one, *_) = read_projected([projected("stylegan2_ada")])
    write_projected(tmp_path / "quiet" / FILE, one.latents, None, one.info)
    refused("not the same noise", runs("stylegan2_ada"), one.path, tmp_path / "quiet")


def test_what_a_family_cannot_walk_is_refused(runs, projected, tmp_path):  # noqa: F811
    def refused(message, family="dcgan", **more):
        with pytest.raises(UserError, match=message):
            walk_of(VideoRequest(runs(family), **more))

    refused("--psi: family dcgan does not truncate", psi=0.5)
    refused("--class 1: family dcgan: it has no classes", label=1)
    refused("--steps: family dcgan does not sample in steps", steps=5)
    refused("--space w: family dcgan has z", space="w")
    refused("--layers: family dcgan has no layers", layers="fine")
    refused("--layers best: choose coarse or fine", layers="best")
    refused("--psi: z is not truncated", "stylegan2_ada", psi=0.5, space="z")
    refused("--layers: latents in z have no layers", "stylegan2_ada", layers="fine", space="z")
    refused("--seed: the projections", latents=(projected("dcgan"),), seed=1)
    refused("--keys: the projections", latents=(projected("dcgan"),), keys=2)
    refused("--layers: family dcgan has no layers", latents=(projected("dcgan"),), layers="fine")
    refused("--psi: the projections", latents=(projected("dcgan"),), psi=0.5)
    one = next(path for path in projected("dcgan").iterdir() if path.is_dir())
    refused("two projections or more", latents=(one,))
    for suffix, grid, size in (
        (".mp4", (9, 1), 2048),
        (".gif", (17, 1), 4096),
        (".gif", (9, 9), 4096),
    ):
        large = VideoRequest(runs("dcgan"), tmp_path / f"b{suffix}", size=size, seconds=0.05)
        with pytest.raises(UserError, match="choose a smaller --grid or --size"):
            write_walk(dataclasses.replace(large, columns=grid[0], rows=grid[1]))
    with pytest.raises(UserError, match="is a folder: give --out"):
        (tmp_path / "a.gif").mkdir()
        write_walk(VideoRequest(runs("dcgan"), tmp_path / "a.gif", seconds=0.1))


def test_classes_are_those_of_the_label(tmp_path):
    from tests.projection.test_search import built

    family, networks = built("ddpm", tmp_path)
    z = family.latents(torch.arange(2), 0)
    assert torch.equal(to_space(family, networks, "z", z, torch.arange(2)), z)
