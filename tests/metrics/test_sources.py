"""The same images are the same pixels, whether they come from shards, files or a generator."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from dinogen.errors import UserError
from dinogen.metrics.sources import Folder, Generated, Images, Reconstructed, as_pixels
from tests.families.tiny import discs
from tests.metrics.small import NUM, pack_images, save_images, small_data


def nchw(images):
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


def test_shards_files_and_a_generator_give_the_same_pixels(tmp_path):
    images = discs(NUM)
    data = small_data(tmp_path / "data")
    # which of them are in val is told by their keys
    mine = [images[int(key.removeprefix("image"))] for key in data.keys("val")]
    assert 6 < len(mine) < NUM - 6
    numbers = [0, len(mine) - 1, 1]
    expected = nchw([mine[number] for number in numbers])
    shards = Images(data, "val", range(len(mine)), 16)
    files = Folder(save_images(mine, tmp_path / "files"))
    floats = nchw(mine).float() / 127.5 - 1
    generated = Generated(lambda indices: floats[indices], len(mine), 16)
    for source in (shards, files, generated):
        found = source.read(numbers)
        assert found.dtype == torch.uint8 and torch.equal(found, expected), source
        assert (source.num, source.resolution) == (len(mine), 16)


def test_some_numbers_of_a_split_shrunk_by_area(tmp_path):
    images = discs(NUM)
    data = small_data(tmp_path / "data")
    keys = data.keys("train")
    source = Images(data, "train", [3, 1], 8)
    for number, of_split in enumerate([3, 1]):
        pixels = images[int(keys[of_split].removeprefix("image"))].astype(np.float64)
        by_area = pixels.reshape(8, 2, 8, 2, 3).mean((1, 3))
        found = source.read([number])[0].permute(1, 2, 0).numpy()
        # Pillow rounds twice: along rows, then along columns
        assert np.abs(found - by_area).max() < 1
    assert source.facts()["resize"] == "box to 8"
    with pytest.raises(UserError, match=r"16x16, too small .* 32x32 against: .*faces.size=32"):
        Images(data, "train", [0], 32)


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
    images = discs(5)
    folder = save_images(images, tmp_path / "files")
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(folder / "grid_16x16.png")
    (folder / "notes.txt").write_text("no image")
    Image.fromarray(images[0][..., 0]).save(folder / "9999.PNG")  # grey, and in capitals
    Image.fromarray(images[1]).save(folder / "aaaa.jpeg", quality=95)
    source = Folder(folder)
    assert source.num == 7
    assert torch.equal(source.read([4, 0]), nchw([images[4], images[0]]))
    grey = source.read([5])[0]
    assert all(torch.equal(plane, torch.from_numpy(images[0][..., 0].copy())) for plane in grey)
    difference = source.read([6]).float() - nchw([images[1]]).float()
    assert 0 < difference.abs().mean() < 20, "a JPEG is nearly what it was"
    assert Folder(folder, 2).num == 2


def oddly_sized(folder):
    Image.new("RGB", (16, 16)).save(folder / "0.png")
    Image.new("RGB", (8, 8)).save(folder / "1.png")


def oblong(folder):
    Image.new("RGB", (16, 8)).save(folder / "0.png")


def no_image(folder):
    (folder / "0.png").write_bytes(b"no image")
    (folder / "1.png").touch()


def unread(folder):
    (folder / "0.jxl").write_bytes(b"\xff\x0a")
    (folder / "1.JXL").write_bytes(b"\xff\x0a")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: None, "no images here that can be read: give"),
        (unread, r"no images here that can be read \(2 .jxl: convert to PNG"),
        (oddly_sized, r"1\.png: 8x8 pixels, but the files before it have 16x16"),
        (oblong, r"0\.png: 16x8 pixels: only square"),
        (no_image, r"none of its 2 images can be read; 0\.png: not_an_image"),
    ],
)
def test_a_folder_that_cannot_be_measured_names_the_file(make, message, tmp_path):
    make(tmp_path)
    with pytest.raises(UserError, match=message):
        Folder(tmp_path)


def test_what_is_damaged_is_left_out_and_named(tmp_path, caplog):
    noise = np.random.default_rng(0).integers(0, 255, (16, 16, 3), np.uint8)
    for name in ("0.png", "1.jpg", "2.png", "3.png"):
        Image.fromarray(noise).save(tmp_path / name)
    whole = (tmp_path / "1.jpg").read_bytes()
    (tmp_path / "1.jpg").write_bytes(whole[: len(whole) // 2] + b"\xff\xd9")
    (tmp_path / "2.png").write_bytes(b"no image")
    (tmp_path / "4.jxl").write_bytes(b"\xff\x0a")
    (tmp_path / "._0.png").write_bytes(b"\0\5\x16\7 beside another")
    source = Folder(tmp_path)
    assert [file.name for file in source.files] == ["0.png", "3.png"] and source.num == 2
    assert source.left_out.keys() == {"1.jpg", "2.png", "4.jxl"}
    assert source.left_out["1.jpg"].startswith("truncated: ")
    assert "3 files are LEFT OUT, all values are from the other 2" in caplog.text
    assert "2.png: not_an_image" in caplog.text
    assert torch.equal(source.read([1]), nchw([noise]))
    assert source.facts() == Folder(tmp_path, 4).facts()
    (tmp_path / "3.png").write_bytes(whole[:99])
    with pytest.raises(UserError, match=r"3\.png: was sound before, now cannot be read"):
        source.read([1])


def test_files_are_read_as_photos_are(tmp_path):
    image = Image.fromarray(discs(1)[0])
    exif = Image.Exif()
    exif[0x0112] = 3
    image.rotate(180).save(tmp_path / "0.png", exif=exif)
    image.save(tmp_path / "1.webp", lossless=True)
    image.quantize(200).save(tmp_path / "2.gif")
    clear = image.convert("RGBA")
    clear.putalpha(0)
    clear.save(tmp_path / "3.png")
    Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257).save(tmp_path / "4.png")
    image.save(tmp_path / "5.tif")
    found = Folder(tmp_path).read([0, 1, 2, 3, 4, 5]).permute(0, 2, 3, 1).numpy()
    for number in (0, 1, 5):
        np.testing.assert_array_equal(found[number], np.asarray(image))
    assert np.abs(found[2].astype(int) - np.asarray(image)).mean() < 9
    assert (found[3] == 255).all()
    np.testing.assert_array_equal(found[4, ..., 1], np.asarray(image.convert("L")))


def test_the_speed_is_that_behind_the_first_batch(monkeypatch):
    took, now = [0.3, 0.02, 0.02], [0.0]
    monkeypatch.setattr(f"{Generated.__module__}.time.monotonic", lambda: now[0])

    def sample(indices):
        now[0] += took.pop(0)
        return torch.zeros(len(indices), 3, 2, 2)

    source = Generated(sample, 8, 2)
    assert source.images_per_s == 0
    source.read([0, 1])
    assert source.images_per_s == pytest.approx(2 / 0.3)
    source.read([2, 3, 4])
    source.read([5, 6, 7])
    assert source.images_per_s == pytest.approx(6 / 0.04)


def test_pairs_are_images_and_what_is_made_of_them(tmp_path):
    data = small_data(tmp_path / "data")
    real = Images(data, "val", range(4), 16)
    asked = []

    def darker(images, numbers):
        asked.append(numbers.tolist())
        return images - 0.2

    pixels, made = Reconstructed(real, darker).read([2, 0])
    assert torch.equal(pixels, real.read([2, 0])) and asked == [[2, 0]]
    expected = (pixels.float() - 25.5).clamp(min=0)
    assert (made.float() - expected).abs().max() <= 0.5 + 1e-3


def test_other_pixels_are_other_data(tmp_path):
    images = discs(12)
    sources = [Folder(save_images(images, tmp_path / "a"))]
    sources.append(Folder(save_images(images, tmp_path / "b")))
    images[3][0, 0, 0] ^= 1
    sources.append(Folder(save_images(images, tmp_path / "c")))
    same, copied, other = (source.facts() for source in sources)
    assert same == copied != other
    packed = pack_images(tmp_path / "packed", images)
    facts = Images(packed, "val", [0], 16).facts()
    assert facts["split"] == "val" and facts["data"] != other["data"]
