"""Pyramids against loops over places, and shrinking against Pillow."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data

from dinogen.features.pyramid import (
    RESIZE,
    native_pyramid,
    pooled_pyramid,
    resized_with_antialias,
    shrink_area,
    to_guide,
)


def random_images(size, num=2):
    return torch.rand(num, 3, size, size, generator=torch.Generator().manual_seed(size)) * 2 - 1


def test_pooled_levels_are_block_means_of_the_16x16_map(patch_guide):
    images = random_images(64)
    levels = pooled_pyramid(patch_guide, images)
    base = patch_guide(to_guide(images, 80)).numpy().astype(np.float64)
    assert list(levels) == [4, 8, 16]
    for grid, level in levels.items():
        side = 16 // grid
        assert level.shape == (2, grid * grid, 6)
        for place in range(grid * grid):
            row, column = place // grid * side, place % grid * side
            block = base[:, :, row : row + side, column : column + side]
            np.testing.assert_allclose(level[:, place], block.mean((2, 3)), atol=1e-6)


def test_pooled_gives_the_grids_asked_for_in_their_order(patch_guide):
    images = random_images(64)
    whole = pooled_pyramid(patch_guide, images)
    part = pooled_pyramid(patch_guide, images, (16, 4))
    assert list(part) == [16, 4]
    assert all(torch.equal(part[grid], whole[grid]) for grid in part)


@pytest.mark.parametrize("grids", [(32,), (5,), ()])
def test_pooled_refuses_grids_that_halving_does_not_reach(patch_guide, grids):
    with pytest.raises(ValueError, match="pooled grids"):
        pooled_pyramid(patch_guide, random_images(64), grids)


def test_native_is_what_a_small_generated_image_goes_through(patch_guide):
    images = random_images(64)
    levels = native_pyramid(patch_guide, images, (4, 8))
    for grid, level in levels.items():
        side = 64 // grid
        small = torch.zeros(2, 3, grid, grid)
        for row in range(grid):
            for column in range(grid):
                block = images[
                    ..., row * side : (row + 1) * side, column * side : (column + 1) * side
                ]
                small[..., row, column] = block.double().mean((2, 3)).float()
        generated = native_pyramid(patch_guide, small, (grid,))[grid]
        torch.testing.assert_close(level, generated, rtol=0, atol=1e-5)
        expected = patch_guide(to_guide(small, 5 * grid))
        for place in range(grid * grid):
            here = expected[:, :, place // grid, place % grid]
            torch.testing.assert_close(level[:, place], here, rtol=0, atol=1e-5)


def test_native_pixels_are_those_of_the_training_images(patch_guide):
    """The reader shrinks uint8 images with Pillow's box filter, which rounds twice."""
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    images = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 127.5 - 1

    for grid in (4, 8, 16):
        box = np.asarray(Image.fromarray(pixels).resize((grid, grid), Image.Resampling.BOX))
        ours = (shrink_area(images, grid)[0].permute(1, 2, 0).numpy() + 1) * 127.5
        assert np.abs(ours - box).max() <= 1.0
        assert np.abs(ours - box).mean() < 0.4


def test_native_refuses_what_has_no_exact_area_mean(patch_guide):
    with pytest.raises(ValueError, match=r"100x100 pixels .* multiple of 16"):
        native_pyramid(patch_guide, random_images(100), (4, 16))
    with pytest.raises(ValueError, match="8x8 pixels cannot be shrunk to 16x16"):
        native_pyramid(patch_guide, random_images(8), (16,))


@pytest.mark.parametrize("pyramid", [pooled_pyramid, native_pyramid])
@pytest.mark.parametrize("side", [16, 160])
def test_gradients_reach_the_pixels(patch_guide, pyramid, side):
    images = random_images(side, 1).double().requires_grad_()
    patch_guide.weight = patch_guide.weight.double()

    def loss(x):
        levels = pyramid(patch_guide, x, (4, 8, 16))
        return sum(level.pow(2).mean() for level in levels.values())

    (gradient,) = torch.autograd.grad(loss(images), images)
    step = torch.randn(images.shape, dtype=torch.float64) * 1e-5
    with torch.no_grad():
        change = (loss(images + step) - loss(images - step)) / 2
    torch.testing.assert_close(change, (gradient * step).sum(), rtol=1e-5, atol=1e-14)
    assert (gradient != 0).double().mean() > 0.99


def cubic_matrix(num_in, num_out, a, antialias):
    """Keys' cubic convolution (1981), edges repeated or, with antialias, left out."""

    def kernel(x):
        x = abs(x)
        if x <= 1:
            return (a + 2) * x**3 - (a + 3) * x**2 + 1
        return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0

    scale = num_in / num_out
    width = max(scale, 1.0) if antialias else 1.0
    matrix = np.zeros((num_out, num_in))
    for i in range(num_out):
        centre = (i + 0.5) * scale - 0.5
        for j in range(int(np.floor(centre - 2 * width)), int(np.ceil(centre + 2 * width)) + 1):
            if antialias:
                if 0 <= j < num_in:
                    matrix[i, j] += kernel((j - centre) / width)
            else:
                matrix[i, min(max(j, 0), num_in - 1)] += kernel(j - centre)
    return matrix / matrix.sum(1, keepdims=True)


@pytest.mark.parametrize(("side", "size"), [(4, 56), (16, 43), (100, 56)])
@pytest.mark.parametrize("antialias", [True, False])
def test_to_guide_is_bicubic_with_antialias(side, size, antialias):
    """Without it where an earlier version enlarged; it never shrank without."""
    images = random_images(side, 1)
    as_pillow = antialias or side > size
    m = cubic_matrix(side, size, a=-0.5 if as_pillow else -0.75, antialias=as_pillow)
    expected = m @ images[0].double().numpy() @ m.T
    np.testing.assert_allclose(to_guide(images, size, antialias)[0], expected, atol=1e-5)


@pytest.mark.parametrize(("side", "size"), [(4, 56), (16, 224), (128, 224), (256, 299), (256, 224)])
def test_to_guide_is_pillow_but_for_its_rounding(side, size):
    photo = Image.fromarray(data.astronaut())
    small = photo.resize((side, side), Image.Resampling.BOX)
    expected = np.asarray(small.resize((size, size), Image.Resampling.BICUBIC)).astype(float)
    images = torch.from_numpy(np.array(small)).permute(2, 0, 1)[None] / 127.5 - 1

    def apart(resized):
        pixels = ((resized[0].permute(1, 2, 0).numpy() + 1) * 127.5).clip(0, 255)
        return np.abs(pixels - expected).mean()

    assert apart(to_guide(images, size)) < 0.35
    assert size < side or apart(to_guide(images, size, antialias=False)) > 0.7


@pytest.mark.parametrize(
    ("prepare", "expected"),
    [
        ({}, True),  # packed by other programs, or before anybody asked
        ({"faces": {}}, True),
        ({"pyramids": {"grids": [4], "kinds": ["native"]}}, False),  # an earlier version's
        ({"pyramids": {"grids": [4], "kinds": ["native"], "resize": RESIZE}}, True),
    ],
)
def test_how_images_were_resized_stands_in_the_manifest(prepare, expected):
    assert resized_with_antialias(prepare) is expected


def test_a_penalty_of_the_gradient_passes_through_the_resize():
    """As R1 of a discriminator that looks through a guide has it."""
    images = random_images(8, 1).double().requires_grad_()

    def squared_gradient(x):
        (gradient,) = torch.autograd.grad(to_guide(x, 21).pow(3).sum(), x, create_graph=True)
        return gradient.pow(2).sum()

    (second,) = torch.autograd.grad(squared_gradient(images), images)
    step = torch.randn(images.shape, dtype=torch.float64) * 1e-6
    change = (squared_gradient(images + step) - squared_gradient(images - step)) / 2
    torch.testing.assert_close(change, (second * step).sum(), rtol=1e-4, atol=1e-12)


def test_to_guide_leaves_a_fitting_image_alone():
    images = random_images(56)
    assert torch.equal(to_guide(images, 56), images)
