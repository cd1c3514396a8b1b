"""Aligned crops show what they should, where they should.

Every photo is painted here, in continuous coordinates, so that it is known where each point of
a crop must lie; pixel i is centred at i + 0.5.
"""

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import zoom

from dinogen.prepare.faces.align import (
    REFERENCE,
    AlignError,
    align_box,
    align_ffhq,
    align_landmarks,
    centre_crop,
)

REFERENCE_128 = np.array([(38, 51), (90, 51), (64, 71), (45, 95), (83, 95)], float)


def paint(points, height, width, radius):
    """White spots on black at the points."""
    y, x = np.mgrid[:height, :width] + 0.5
    photo = np.zeros((height, width))
    for px, py in points:
        photo += np.exp(-((x - px) ** 2 + (y - py) ** 2) / (2 * radius**2))
    return np.repeat((255 * photo.clip(0, 1)).astype(np.uint8)[..., None], 3, axis=2)


def locate(crop, expected, reach):
    """Centroid of the spot near each expected point."""
    y, x = np.mgrid[: crop.shape[0], : crop.shape[1]] + 0.5
    grey = crop[..., 0].astype(float)
    found = []
    for px, py in expected:
        weight = grey * ((x - px) ** 2 + (y - py) ** 2 < reach**2)
        found.append([(weight * x).sum() / weight.sum(), (weight * y).sum() / weight.sum()])
    return np.array(found)


def move(points, scale, degrees, shift):
    angle = np.radians(degrees)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return (np.asarray(points) - 64) @ turn.T * scale + shift


@pytest.mark.parametrize("scale", [0.4, 0.75, 1.0, 2.0, 3.1, 7.3])
@pytest.mark.parametrize("degrees", [0, 17, -42, 90, 180])
def test_landmarks_come_to_lie_on_the_reference(scale, degrees):
    points = move(REFERENCE_128, scale, degrees, (501.3, 480.7))
    photo = paint(points, 1000, 1000, radius=max(1.5, 3 * scale))
    for size in (64, 128, 256):
        crop = align_landmarks(photo, [tuple(p) for p in points], size)
        assert crop.shape == (size, size, 3)
        assert crop.dtype == np.uint8
        expected = REFERENCE_128 * size / 128
        found = locate(crop, expected, reach=9 * size / 128)
        np.testing.assert_allclose(found, expected, atol=0.25)


@pytest.mark.parametrize("align", [align_landmarks, align_ffhq])
@pytest.mark.parametrize("scale", [0.7, 1.0, 2.6])
def test_a_mirrored_photo_gives_the_mirrored_crop(align, scale):
    """x is W - x on the mirror image; half a pixel between the two would show at every edge."""
    rng = np.random.default_rng(3)
    width, height = 430, 400
    coarse = rng.integers(0, 256, (height // 4, width // 4 + 1, 3)).astype(float)
    photo = zoom(coarse, (4, 4, 1), order=3)[:height, :width].clip(0, 255).astype(np.uint8)
    points = move(REFERENCE_128 + rng.uniform(-2, 2, (5, 2)), scale, 9, (211.3, 190.6))
    mirrored = (points * [-1, 1] + [width, 0])[[1, 0, 2, 4, 3]]
    crop = align(photo, [tuple(p) for p in points], 128).astype(int)
    other = align(photo[:, ::-1].copy(), [tuple(p) for p in mirrored], 128).astype(int)
    assert np.abs(crop - other[:, ::-1]).mean() < 0.2
    shifted = align(photo[:, ::-1].copy(), [(x + 0.5, y) for x, y in mirrored], 128)
    assert np.abs(crop - shifted[:, ::-1]).mean() > 1


def test_a_real_face_is_no_similarity_and_still_comes_near():
    """The least-squares fit of a face with its own proportions spreads the error."""
    face = REFERENCE_128 + np.array([(2, -1), (-2, 1), (3, 2), (-1, -2), (1, 1)])
    points = move(face, 1.7, 12, (400, 400))
    photo = paint(points, 800, 800, radius=4)
    crop = align_landmarks(photo, [tuple(p) for p in points], 256)
    found = locate(crop, face * 2, reach=20)
    assert np.abs(found - 2 * REFERENCE_128).max() < 7
    assert np.abs((found - 2 * REFERENCE_128).mean(axis=0)).max() < 0.3  # shifts cancel


def test_a_small_crop_is_the_large_one_shrunk():
    rng = np.random.default_rng(0)
    smooth = zoom(rng.integers(0, 256, (20, 20, 3)).astype(float), (20, 20, 1), order=3)
    photo = smooth.clip(0, 255).astype(np.uint8)
    points = [tuple(p) for p in move(REFERENCE_128, 1.4, 8, (200, 200))]
    large = Image.fromarray(align_landmarks(photo, points, 256))
    small = align_landmarks(photo, points, 64)
    expected = np.asarray(large.resize((64, 64), Image.Resampling.BOX)).astype(int)
    assert np.abs(small - expected).mean() < 2


@pytest.mark.parametrize("scale", [1.2, 1.9, 2.1, 3.0, 8.0])
@pytest.mark.parametrize("degrees", [0, 30, 45])
def test_a_fine_checkerboard_shrinks_to_grey(scale, degrees):
    y, x = np.mgrid[:1400, :1400]
    photo = np.repeat(((x + y) % 2 * 255).astype(np.uint8)[..., None], 3, axis=2)
    points = move(REFERENCE_128, scale, degrees, (700, 700))
    crop = align_landmarks(photo, [tuple(p) for p in points], 128)
    # 8 bits clip the overshoot of this worst of all photos, which leaves a trace
    assert np.abs(crop.astype(int) - 127).max() <= (16 if scale < 1.5 else 6)


def test_outside_the_photo_lies_its_mirror_image():
    rng = np.random.default_rng(1)
    photo = rng.integers(0, 256, (40, 30, 3), np.uint8)
    # a square at the photo's own scale that reaches 25 beyond the left and 15 above the top
    crop = align_box(photo, (-25, -15, 25, 35), 50, 0)
    np.testing.assert_array_equal(crop[15:, 25:], photo[:35, :25])
    np.testing.assert_array_equal(crop[15:, :25], photo[:35, :25][:, ::-1])
    np.testing.assert_array_equal(crop[:15, 25:], photo[:15, :25][::-1])


def test_a_square_many_times_the_photo_is_still_filled():
    photo = np.full((7, 5, 3), 200, np.uint8)
    crop = align_box(photo, (-40, -40, 60, 60), 64, 1.0)
    assert (crop == 200).all()


@pytest.mark.parametrize("margin", [0.0, 0.25, 1.0])
def test_box_is_square_centred_and_has_its_margin(margin):
    photo = np.zeros((600, 800, 3), np.uint8)
    photo[240:340, 350:410] = 255  # 60 wide, 100 high
    crop = align_box(photo, (350, 240, 410, 340), 200, margin)
    side = 200 / (1 + 2 * margin)  # of the square on the longer side of the box
    white = crop[..., 0] > 127
    rows, columns = np.flatnonzero(white.any(axis=1)), np.flatnonzero(white.any(axis=0))
    assert rows[[0, -1]] == pytest.approx([100 - side / 2, 99 + side / 2], abs=1)
    assert columns[[0, -1]] == pytest.approx([100 - 0.3 * side, 99 + 0.3 * side], abs=1)


def test_centre_crop_of_an_aligned_photo_changes_nothing(noise):
    np.testing.assert_array_equal(centre_crop(noise, 48), noise[:, 8:56])
    tall = noise.transpose(1, 0, 2).copy()
    np.testing.assert_array_equal(centre_crop(tall, 48), tall[8:56])


def test_centre_crop_shrinks_like_a_mean_of_blocks():
    ramp = np.linspace(0, 255, 512)
    photo = np.repeat(np.tile(ramp, (512, 1))[..., None], 3, axis=2).astype(np.uint8)
    crop = centre_crop(photo, 64)[..., 0].astype(float)
    means = photo[..., 0].reshape(64, 8, 64, 8).mean(axis=(1, 3))
    np.testing.assert_allclose(crop[:, 2:-2], means[:, 2:-2], atol=1.5)


def test_one_pixel_and_one_row():
    assert (centre_crop(np.full((1, 1, 3), 9, np.uint8), 16) == 9).all()
    assert (align_box(np.full((1, 90, 3), 9, np.uint8), (10, 0, 50, 1), 16, 0.3) == 9).all()


def ffhq_square(points):
    """Corners by the recipe's own definition: x along the eyes, y across, c the centre."""
    left_eye, right_eye, _, left_mouth, right_mouth = np.asarray(points, float)
    eyes, mouth = (left_eye + right_eye) / 2, (left_mouth + right_mouth) / 2
    to_eye, to_mouth = right_eye - left_eye, mouth - eyes
    x = to_eye - to_mouth[::-1] * [-1, 1]
    x = x / np.hypot(*x) * max(np.hypot(*to_eye) * 2.0, np.hypot(*to_mouth) * 1.8)
    y = x[::-1] * [-1, 1]
    centre = eyes + to_mouth * 0.1
    return np.stack([centre - x - y, centre + x - y, centre + x + y, centre - x + y])


@pytest.mark.parametrize("scale", [0.6, 1.5, 3.0])
@pytest.mark.parametrize("degrees", [0, 25, -60])
def test_ffhq_square(scale, degrees):
    face = REFERENCE_128 + np.array([(1, 2), (0, 0), (0, 0), (0, 1), (2, 0)])
    points = move(face, scale, degrees, 600.0)
    corners = ffhq_square(points)
    # spots 10 % inside the corners of the square must come to lie 10 % inside those of the crop
    spots = corners.mean(axis=0) + 0.8 * (corners - corners.mean(axis=0))
    crop = align_ffhq(paint(spots, 1200, 1200, 4 * scale), [tuple(p) for p in points], 256)
    expected = np.array([(25.6, 25.6), (230.4, 25.6), (230.4, 230.4), (25.6, 230.4)])
    np.testing.assert_allclose(locate(crop, expected, reach=20), expected, atol=0.5)


def test_ffhq_fades_its_surroundings_and_keeps_the_face():
    rng = np.random.default_rng(2)
    photo = rng.integers(0, 256, (400, 400, 3), np.uint8)
    photo[:, :200, 0] = 255
    points = [tuple(p) for p in move(REFERENCE_128, 1.0, 0, (90, 90))]
    corners = ffhq_square(points)
    assert corners.min() < -10  # the square leaves the photo above and on the left
    size = round(np.hypot(*(corners[1] - corners[0])))
    crop = align_ffhq(photo, points, size).astype(float)
    inside = crop[size // 2 : size // 2 + 60, size // 2 : size // 2 + 60]
    outside = crop[:8, :8]
    assert inside[..., 1].std() > 3 * outside[..., 1].std()  # noise is blurred away
    # a whole face in the middle of a photo is left as it is
    middle = [tuple(p) for p in move(REFERENCE_128, 1.0, 0, (200, 200))]
    low = ffhq_square(middle)[0]
    whole = align_ffhq(photo, middle, size)
    exact = photo[int(low[1]) + 40 : int(low[1]) + 80, int(low[0]) + 40 : int(low[0]) + 80]
    assert abs(whole[40:80, 40:80].astype(float).std() - exact.std()) < 0.4 * exact.std()


def test_ffhq_mirrors_beyond_the_edge():
    """Brightness beside the edge continues; black, which no padding would give, is far."""
    photo = np.full((300, 300, 3), 180, np.uint8)
    points = [tuple(p) for p in move(REFERENCE_128, 1.0, 0, (60, 60))]
    assert (align_ffhq(photo, points, 128) == 180).all()


@pytest.mark.parametrize("align", [align_landmarks, align_ffhq])
@pytest.mark.parametrize("points", [[(5.0, 5.0)] * 5, [(float("nan"), 1.0)] * 5])
def test_points_without_a_square_are_an_error(align, points, noise):
    with pytest.raises(AlignError):
        align(noise, points, 32)


def test_a_box_without_area_is_an_error(noise):
    with pytest.raises(AlignError):
        align_box(noise, (10, 10, 10, 10), 32, 0.3)


def test_the_reference_is_the_documented_one():
    np.testing.assert_array_equal(REFERENCE, REFERENCE_128)
