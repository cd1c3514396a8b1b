"""Blitting and geometric transforms: exact, invertible, and as scipy's."""

import math

import numpy as np
import pytest
import pywt
import torch
from scipy import ndimage

from dinogen.networks.ada import transforms
from dinogen.networks.ada.transforms import SYM6, apply, mirrored, rotation, scaling, translation

SIZE = 32


def blit(images, matrices):
    return apply(images, [transforms.blit(images, matrices[None])])


def warp(images, matrices):
    return apply(images, [transforms.warp(images, matrices[None])])


def one(*values):
    return [torch.tensor([value], dtype=torch.float64) for value in values]


def noise(size=SIZE):
    return torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0)).double()


def smooth(size=SIZE):
    y, x = np.mgrid[:size, :size] / size
    waves = [np.cos(2 * np.pi * (a * x + b * y) + a) for a, b in ((1, 0.5), (-0.5, 1.5), (2, 1))]
    return torch.from_numpy(np.stack(waves))[None]


QUARTERS = [rotation(k * torch.tensor([math.pi / 2])).round() for k in range(4)]
MIRROR = scaling(*one(-1, 1))


@pytest.mark.parametrize("matrix", [*QUARTERS, MIRROR, MIRROR @ QUARTERS[1]])
@pytest.mark.parametrize("size", [7, 8])
def test_mirrors_and_quarter_turns_lose_nothing(matrix, size):
    images = noise(size)
    there = blit(images, matrix)
    assert torch.equal(blit(there, torch.linalg.inv(matrix)), images)
    assert torch.equal(there.flatten().sort().values, images.flatten().sort().values)


def test_mirrors_and_turns_are_torch_s():
    images = noise()
    assert torch.equal(blit(images, MIRROR), images.flip(3))
    # y points down: from x towards y is clockwise
    assert torch.equal(blit(images, QUARTERS[1]), images.rot90(-1, (2, 3)))


def test_whole_shifts_move_pixels_and_mirror_at_the_border():
    images = noise()
    moved = blit(images, translation(*one(3, -2)))
    assert torch.equal(moved[:, :, :-2, 3:], images[:, :, 2:, :-3])
    assert torch.equal(moved[:, :, :-2, :3], images[:, :, 2:, 1:4].flip(3))
    back = blit(moved, translation(*one(-3, 2)))
    assert torch.equal(back[:, :, 2:, :-3], images[:, :, 2:, :-3])


def test_places_are_mirrored_as_numpy_pads():
    found = mirrored(torch.arange(-11, 17), 5)
    assert found.tolist() == np.pad(np.arange(5), (11, 12), mode="reflect").tolist()


def test_the_filter_is_the_wavelet_sym6():
    np.testing.assert_allclose(SYM6, pywt.Wavelet("sym6").dec_lo, atol=1e-12)


@pytest.mark.parametrize("shift", [(0.0, 1.0), (-5.0, 3.0), (40.0, 0.0)])
def test_between_its_filters_a_whole_shift_is_exact(shift):
    """Perfect reconstruction by the orthogonal wavelet, borders included."""
    matrix = translation(*one(*shift))
    torch.testing.assert_close(warp(noise(), matrix), blit(noise(), matrix), rtol=1e-6, atol=1e-6)


TRANSFORMS = {
    "scale up": scaling(*one(1.3, 1.3)),
    "scale down": scaling(*one(0.7, 0.7)),
    "stretch": scaling(*one(1.2, 1 / 1.2)),
    "rotate": rotation(*one(0.7)),
    "turn over": rotation(*one(math.pi)),
    "translate": translation(*one(2.3, -1.6)),
    "all": translation(*one(0.3, 1.1)) @ rotation(*one(0.4)) @ scaling(*one(0.9, 1.2)),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_transform_is_scipys(name):
    matrix = TRANSFORMS[name]
    found = warp(smooth(), matrix)[0].numpy()
    inverse = torch.linalg.inv(matrix)[0].numpy()
    # scipy counts (y, x) from the first pixel
    swapped = inverse[[1, 0]][:, [1, 0, 2]]
    centre = (SIZE - 1) / 2
    offset = swapped[:, 2] + centre - swapped[:, :2] @ [centre, centre]
    for channel, image in zip(found, smooth()[0].numpy(), strict=True):
        expected = ndimage.affine_transform(image, swapped[:, :2], offset, order=3, mode="mirror")
        assert np.abs(channel - expected)[2:-2, 2:-2].max() < 0.12
        assert np.abs(channel - expected).mean() < 0.02


@pytest.mark.parametrize("name", TRANSFORMS)
def test_its_inverse_gives_the_image_back(name):
    matrix = TRANSFORMS[name]
    there = warp(smooth(), matrix)
    back = warp(there, torch.linalg.inv(matrix))
    inner = slice(10, -10)  # what went outside comes back as a mirror image
    changed = (there - smooth())[:, :, inner, inner].abs().mean()
    left = (back - smooth())[:, :, inner, inner].abs().mean()
    assert left < 0.03
    assert changed > 5 * left


def test_samples_have_matrices_of_their_own():
    images = torch.cat([noise(), noise()])
    both = torch.cat([TRANSFORMS["rotate"], TRANSFORMS["scale down"]])
    found = warp(images, both)
    for i in range(2):
        alone = warp(images[i : i + 1], both[i : i + 1])
        torch.testing.assert_close(found[i : i + 1], alone, rtol=1e-6, atol=1e-6)


def test_shrinking_does_not_alias():
    """The finest checkerboard shrinks to grey, not to a pattern that is not there."""
    y, x = np.mgrid[:SIZE, :SIZE]
    board = torch.from_numpy((-1.0) ** (x + y)).expand(1, 1, -1, -1)
    found = warp(board, scaling(*one(0.6, 0.6)))
    assert found[:, :, 4:-4, 4:-4].abs().mean() < 0.1


@pytest.mark.parametrize("function", [blit, warp])
def test_twice_differentiable(function):
    x = torch.randn(1, 1, 4, 4, dtype=torch.float64, requires_grad=True)
    matrix = QUARTERS[1] if function is blit else TRANSFORMS["all"]
    assert torch.autograd.gradcheck(lambda x: function(x, matrix), (x,))
    assert torch.autograd.gradgradcheck(lambda x: function(x, matrix), (x,))
