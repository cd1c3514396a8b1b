"""The same pictures are the same pixels, whether they come from shards, files or a generator."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from PIL import Image

from dinogen.errors import UserError
from dinogen.metrics.sources import Folder, Generated, Pictures, Reconstructed, as_pixels
from tests.families.tiny import discs
from tests.metrics.small import NUM, pack_pictures, save_pictures, small_data


def nchw(pictures):
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)


def test_shards_files_and_a_generator_give_the_same_pixels(tmp_path):
    pictures = discs(NUM)
    data = small_data(tmp_path / "data")
    # which of them are in val is told by their keys
    mine = [pictures[int(key.removeprefix("picture"))] for key in data.keys("val")]
    assert 6 < len(mine) < NUM - 6
    numbers = [0, len(mine) - 1, 1]
    expected = nchw([mine[number] for number in numbers])
    shards = Pictures(data, "val", range(len(mine)), 16)
    files = Folder(save_pictures(mine, tmp_path / "files"))
    floats = nchw(mine).float() / 127.5 - 1
    generated = Generated(lambda indices: floats[indices], len(mine), 16)
    for source in (shards, files, generated):
        found = source.read(numbers)
        assert found.dtype == torch.uint8 and torch.equal(found, expected), source
        assert (source.num, source.resolution) == (len(mine), 16)


def test_some_numbers_of_a_split_shrunk_by_area(tmp_path):
    pictures = discs(NUM)
    data = small_data(tmp_path / "data")
    keys = data.keys("train")
    source = Pictures(data, "train", [3, 1], 8)
    for number, of_split in enumerate([3, 1]):
        pixels = pictures[int(keys[of_split].removeprefix("picture"))].astype(np.float64)
        by_area = pixels.reshape(8, 2, 8, 2, 3).mean((1, 3))
        found = source.read([number])[0].permute(1, 2, 0).numpy()
        # Pillow rounds twice: along rows, then along columns
        assert np.abs(found - by_area).max() < 1
    assert source.facts()["resize"] == "box to 8"
    with pytest.raises(UserError, match=r"16x16, too small .* 32x32 against: .*faces.size=32"):
        Pictures(data, "train", [0], 32)


def test_what_is_generated_is_rounded_as_files_are():
    values = torch.tensor([-3.0, -1.0, -0.5, 0.0, 0.5, 0.99999, 2.0])
    images = values.view(-1, 1, 1, 1).expand(-1, 3, 2, 2).clone()
    expected = np.rint((np.clip(values.numpy(), -1, 1) + 1) * 127.5).astype(np.uint8)
    assert as_pixels(images)[:, 1, 0, 1].tolist() == expected.tolist()
    images[0, 2, 0, 0] = torch.nan
    broken = as_pixels(images)
    assert broken[0, :, 0, 0].tolist() == [255, 0, 255], "not finite is seen, and not black"
    assert broken[0, :, 1, 1].tolist() == [0, 0, 0]


def test_a_folder_is_read_in_order_and_without_its_grid(tmp_path):
    pictures = discs(5)
    folder = save_pictures(pictures, tmp_path / "files")
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(folder / "grid_16x16.png")
    (folder / "notes.txt").write_text("no picture")
    Image.fromarray(pictures[0][..., 0]).save(folder / "9999.PNG")  # grey, and in capitals
    Image.fromarray(pictures[1]).save(folder / "aaaa.jpeg", quality=95)
    source = Folder(folder)
    assert source.num == 7
    assert torch.equal(source.read([4, 0]), nchw([pictures[4], pictures[0]]))
    grey = source.read([5])[0]
    assert all(torch.equal(plane, torch.from_numpy(pictures[0][..., 0].copy())) for plane in grey)
    difference = source.read([6]).float() - nchw([pictures[1]]).float()
    assert 0 < difference.abs().mean() < 20, "a JPEG is nearly what it was"
    assert Folder(folder, 2).num == 2


def oddly_sized(folder):
    Image.new("RGB", (16, 16)).save(folder / "0.png")
    Image.new("RGB", (8, 8)).save(folder / "1.png")


def oblong(folder):
    Image.new("RGB", (16, 8)).save(folder / "0.png")


def no_picture(folder):
    (folder / "0.png").write_bytes(b"no picture")


def deep(folder):
    Image.fromarray(np.zeros((8, 8), np.uint16)).save(folder / "0.png")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: None, "no PNG or JPEG files here"),
        (oddly_sized, r"1\.png: 8x8 pixels, but the files before it have 16x16"),
        (oblong, r"0\.png: 16x8 pixels: only square"),
        (no_picture, r"0\.png: cannot be read as a picture"),
        (deep, r"0\.png: pixels of kind I.*: save it as RGB"),
    ],
)
def test_a_folder_that_cannot_be_measured_names_the_file(make, message, tmp_path):
    make(tmp_path)
    with pytest.raises(UserError, match=message):
        Folder(tmp_path)


def test_damage_and_transparency_are_found_where_pixels_are_read(tmp_path):
    Image.new("RGBA", (64, 64), (1, 2, 3, 255)).save(tmp_path / "0.png")
    Image.new("RGBA", (64, 64), (1, 2, 3, 254)).save(tmp_path / "1.png")
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "2.png")
    whole = (tmp_path / "2.png").read_bytes()
    (tmp_path / "2.png").write_bytes(whole[: len(whole) // 2])
    source = Folder(tmp_path)
    assert source.read([0])[0, :, 5, 5].tolist() == [1, 2, 3]
    with pytest.raises(UserError, match=r"1\.png: is partly transparent"):
        source.read([1])
    with pytest.raises(UserError, match=r"2\.png: cannot be read as a picture"):
        source.read([2])


def test_the_speed_is_that_behind_the_first_batch():
    naps = [0.3, 0.02, 0.02]

    def sample(indices):
        time.sleep(naps.pop(0))
        return torch.zeros(len(indices), 3, 2, 2)

    source = Generated(sample, 8, 2)
    assert source.images_per_s == 0
    source.read([0, 1])
    assert source.images_per_s < 2 / 0.3
    source.read([2, 3, 4])
    source.read([5, 6, 7])
    assert 20 < source.images_per_s < 6 / 0.04


def test_pairs_are_pictures_and_what_is_made_of_them(tmp_path):
    data = small_data(tmp_path / "data")
    real = Pictures(data, "val", range(4), 16)
    asked = []

    def darker(images, numbers):
        asked.append(numbers.tolist())
        return images - 0.2

    pixels, made = Reconstructed(real, darker).read([2, 0])
    assert torch.equal(pixels, real.read([2, 0])) and asked == [[2, 0]]
    expected = (pixels.float() - 25.5).clamp(min=0)
    assert (made.float() - expected).abs().max() <= 0.5 + 1e-3


def test_other_pixels_are_other_data(tmp_path):
    pictures = discs(12)
    sources = [Folder(save_pictures(pictures, tmp_path / "a"))]
    sources.append(Folder(save_pictures(pictures, tmp_path / "b")))
    pictures[3][0, 0, 0] ^= 1
    sources.append(Folder(save_pictures(pictures, tmp_path / "c")))
    same, copied, other = (source.facts() for source in sources)
    assert same == copied != other
    packed = pack_pictures(tmp_path / "packed", pictures)
    facts = Pictures(packed, "val", [0], 16).facts()
    assert facts["split"] == "val" and facts["data"] != other["data"]
