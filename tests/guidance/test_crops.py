"""Crops of images whose pixels are their own coordinates."""

import pytest
import torch

from dinogen.guidance.discriminator import random_crops, tiles

SIDE = 20


def coordinates(num=1):
    """(num, 2, SIDE, SIDE): row and column of each pixel."""
    rows, columns = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    return torch.stack([rows, columns]).float().repeat(num, 1, 1, 1)


def crops(num, size, first=0, purpose="crop"):
    positions = torch.arange(first, first + num)
    return random_crops(coordinates(num), size, 5, purpose, positions)


@pytest.mark.parametrize("size", [7, 19])
def test_a_crop_is_a_square_of_the_image_and_every_corner_occurs(size):
    parts = crops(1500, size)
    corners = parts[:, :, 0, 0].long()
    steps = torch.arange(size)
    assert torch.equal(parts[:, 0], (corners[:, 0, None] + steps)[:, :, None].expand(-1, -1, size))
    assert torch.equal(parts[:, 1], (corners[:, 1, None] + steps)[:, None].expand(-1, size, -1))
    room = SIDE - size + 1
    seen = torch.bincount(corners[:, 0] * room + corners[:, 1], minlength=room**2)
    assert len(seen) == room**2
    assert seen.min() > 0
    # chi-square of a uniform draw: mean room^2 - 1, standard deviation root of twice that
    expected = 1500 / room**2
    chi = ((seen - expected) ** 2 / expected).sum().item()
    assert abs(chi - room**2 + 1) < 5 * (2 * room**2) ** 0.5


def test_a_corner_depends_on_position_seed_and_purpose():
    whole = crops(8, 7)
    assert torch.equal(torch.cat([crops(3, 7), crops(5, 7, first=3)]), whole)
    assert not torch.equal(crops(8, 7, purpose="other"), whole)
    other = random_crops(coordinates(8), 7, 6, "crop", torch.arange(8))
    assert not torch.equal(other, whole)


def test_a_crop_of_the_whole_is_the_same_image():
    images = coordinates(2)
    assert random_crops(images, SIDE, 5, "crop", torch.arange(2)) is images


def test_gradients_reach_what_was_cut_out_and_nothing_else():
    images = coordinates(3).requires_grad_()
    parts = random_crops(images, 7, 5, "crop", torch.arange(3))
    parts.sum().backward()
    assert images.grad.sum() == parts.numel()
    assert set(images.grad.unique().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize(("size", "num"), [(20, 1), (19, 4), (10, 4), (7, 9), (5, 16)])
def test_tiles_cover_the_image_with_the_fewest_crops(size, num):
    parts = tiles(coordinates()[0], size)
    assert parts.shape == (num, 2, size, size)
    seen = (parts[:, 0] * SIDE + parts[:, 1]).long().flatten().unique()
    assert len(seen) == SIDE**2
