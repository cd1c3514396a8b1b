"""Sheets: every image pixel by pixel where it belongs, whatever words stand beside it."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from dinogen.report.images import LINE, Sheet, draw_sheet, save_animation, save_sheet, with_corner

RNG = np.random.default_rng(0)
GAP = 2


def make_images(num, side=32):
    return RNG.integers(0, 200, (num, side, side, 3), dtype=np.uint8)


def tile(canvas, row, column, top, left, side=96):
    y, x = top + row * (side + GAP), left + column * (side + GAP)
    return np.asarray(canvas)[y : y + side, x : x + side]


def test_small_images_are_enlarged_by_a_whole_factor_and_nothing_else_is_drawn():
    images = make_images(5)
    canvas = draw_sheet(Sheet(images, 3))
    assert canvas.size == (3 * 98 - 2, 2 * 98 - 2)
    for number in range(5):
        found = tile(canvas, number // 3, number % 3, 0, 0)
        assert np.array_equal(found[1::3, 1::3], images[number])
        assert np.array_equal(found, images[number].repeat(3, 0).repeat(3, 1))
    assert (tile(canvas, 1, 2, 0, 0) == 255).all()


def test_large_images_stay_as_they_are():
    images = make_images(2, 128)
    canvas = np.asarray(draw_sheet(Sheet(images, 2)))
    assert canvas.shape == (128, 258, 3)
    assert np.array_equal(canvas[:, 130:], images[1])


def test_words_take_room_of_their_own():
    images = make_images(6)
    plain = draw_sheet(Sheet(images, 3))
    heads = draw_sheet(Sheet(images, 3, ["one", "two", "three"]))
    assert heads.size == (plain.size[0], plain.size[1] + LINE), "only the first row has words"
    assert np.array_equal(np.asarray(heads)[LINE:], np.asarray(plain))
    assert (np.asarray(heads)[:LINE] < 128).any()
    lower = draw_sheet(Sheet(images, 3, ["", "", "", "four"]))
    assert np.array_equal(np.asarray(lower)[:98], np.asarray(plain)[:98])
    assert np.array_equal(np.asarray(lower)[98 + LINE :], np.asarray(plain)[98:])
    beside = draw_sheet(Sheet(images, 3, left=["a long word", "b"]))
    margin = beside.size[0] - plain.size[0]
    assert margin > 40
    assert np.array_equal(np.asarray(beside)[:, margin:], np.asarray(plain))


def test_a_table_has_its_heads_above_and_left_of_it():
    above, left, table = (RNG.uniform(-1, 1, (n, 3, 8, 8)) for n in (3, 2, 6))
    found = with_corner(above, left, table).reshape(3, 4, 8, 8, 3)

    def pixels(x):
        return np.rint((x.transpose(1, 2, 0) + 1) * 127.5).astype(np.uint8)

    assert (found[0, 0] == 255).all()
    for column in range(3):
        assert np.array_equal(found[0, 1 + column], pixels(above[column]))
        for row in range(2):
            assert np.array_equal(found[1 + row, 1 + column], pixels(table[3 * row + column]))
    assert np.array_equal(found[2, 0], pixels(left[1]))


def test_a_png_holds_every_pixel(tmp_path):
    sheet = Sheet(make_images(4), 2, ["x"])
    save_sheet(sheet, tmp_path / "new" / "sheet.png")
    found = Image.open(tmp_path / "new" / "sheet.png")
    assert np.array_equal(np.asarray(found), np.asarray(draw_sheet(sheet)))


def test_a_gif_shows_each_sheet_in_turn_for_ever(tmp_path):
    greys = (40, 120, 200)
    sheets = [Sheet(np.full((4, 32, 32, 3), g, np.uint8), 2, [f"{g} words"]) for g in greys]
    save_animation(sheets, tmp_path / "sheets.gif", 0.5)
    with Image.open(tmp_path / "sheets.gif") as gif:
        assert gif.n_frames == 3 and gif.info["loop"] == 0
        for number, grey in enumerate(greys):
            gif.seek(number)
            assert gif.info["duration"] == pytest.approx(1500 if number == 2 else 500)
            middle = np.asarray(gif.convert("RGB"))[LINE + 10 : LINE + 90, 10:90].astype(int)
            assert abs(middle - grey).max() <= 4
