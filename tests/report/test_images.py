"""Grids: the pixels of the PNG are those that were put in, enlarged, in reading order."""

import numpy as np
import pytest
from PIL import Image

from dinogen.report.images import GAP, save_grid


def read(path):
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def test_a_4x4_image_is_enlarged_to_visible_square_pixels(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (5, 4, 4, 3), dtype=np.uint8)
    sheet = read(save_grid(images, tmp_path / "grid.png", columns=3))
    assert sheet.shape == (2 * 64 + GAP, 3 * 64 + 2 * GAP, 3)
    for number, (row, column) in enumerate([(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]):
        for y in range(4):
            for x in range(4):
                top, left = row * (64 + GAP) + y * 16, column * (64 + GAP) + x * 16
                block = sheet[top : top + 16, left : left + 16]
                assert (block == images[number, y, x]).all()


def test_large_images_keep_their_size(tmp_path):
    images = np.zeros((4, 128, 128, 3), np.uint8)
    assert read(save_grid(images, tmp_path / "grid.png")).shape[:2] == (256 + GAP, 256 + GAP)


def test_floats_span_minus_one_to_one_and_are_clipped(tmp_path):
    values = np.array([-3.0, -1.0, 0.0, 1.0, 3.0], np.float32)
    images = np.broadcast_to(values[:, None, None, None], (5, 3, 64, 64))
    sheet = read(save_grid(images, tmp_path / "grid.png", columns=5))
    assert [int(sheet[32, 32 + n * (64 + GAP), 0]) for n in range(5)] == [0, 0, 128, 255, 255]


def test_channels_of_floats_are_red_green_blue(tmp_path):
    image = np.full((1, 3, 64, 64), -1.0)
    image[:, 0] = 1.0
    assert read(save_grid(image, tmp_path / "grid.png"))[0, 0].tolist() == [255, 0, 0]


def test_a_pixel_that_is_not_finite_cannot_pass_for_an_image(tmp_path):
    image = np.zeros((1, 3, 64, 64), np.float32)
    image[0, 1, 5, 7] = np.nan
    sheet = read(save_grid(image, tmp_path / "grid.png"))
    assert sheet[5, 7].tolist() == [255, 0, 255]
    assert sheet[0, 0].tolist() == [128, 128, 128]


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (3, 4, 4), (2, 1, 4, 4)])
def test_other_shapes_are_refused_by_name(tmp_path, shape):
    with pytest.raises(ValueError, match=r"not float32 \("):
        save_grid(np.zeros(shape, np.float32), tmp_path / "grid.png")


def test_a_write_that_fails_leaves_the_old_file_and_no_litter(tmp_path, monkeypatch):
    path = save_grid(np.zeros((1, 4, 4, 3), np.uint8), tmp_path / "grid.png")
    before = path.read_bytes()

    def full(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="disk full"):
        save_grid(np.ones((1, 4, 4, 3), np.uint8), path)
    assert path.read_bytes() == before
    assert [item.name for item in tmp_path.iterdir()] == ["grid.png"]
