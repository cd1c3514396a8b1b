"""Colour matrices: invertible, and what they keep."""

import colorsys
import math

import pytest
import torch

from dinogen.networks.ada import transforms
from dinogen.networks.ada.transforms import apply, brightness, contrast, hue, luma_flip, saturation


def color(images, matrices):
    return apply(images, [transforms.color(images, matrices[None])])


def random_images():
    return torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)).double() * 2 - 1


def two(a, b):
    return torch.tensor([a, b], dtype=torch.float64)


PAIRS = {
    "brightness": (brightness(two(0.3, -0.2)), brightness(two(-0.3, 0.2))),
    "contrast": (contrast(two(2, 0.4)), contrast(two(0.5, 2.5))),
    "luma flip": (luma_flip(two(1, 0)), luma_flip(two(1, 0))),
    "hue": (hue(two(1, -2)), hue(two(-1, 2))),
    "saturation": (saturation(two(3, 0.5)), saturation(two(1 / 3, 2))),
}


@pytest.mark.parametrize("name", PAIRS)
def test_the_inverse_gives_the_image_back(name):
    there, back = PAIRS[name]
    changed = color(random_images(), there)
    assert (changed[0] - random_images()[0]).abs().max() > 0.1
    torch.testing.assert_close(color(changed, back), random_images())


def test_brightness_and_contrast_by_hand():
    images = random_images()
    torch.testing.assert_close(color(images, PAIRS["brightness"][0])[1], images[1] - 0.2)
    torch.testing.assert_close(color(images, PAIRS["contrast"][0])[0], images[0] * 2)


def test_luma_flip_negates_grey_and_keeps_the_rest():
    images = random_images()[:1]
    found = color(images, luma_flip(torch.ones(1).double()))
    grey = images.mean(1, keepdim=True)
    torch.testing.assert_close(found, images - 2 * grey)


def test_saturation_is_about_grey():
    images = random_images()[:1]
    grey = images.mean(1, keepdim=True)
    found = color(images, saturation(torch.tensor([2.0]).double()))
    torch.testing.assert_close(found, grey + 2 * (images - grey))
    without = color(images, saturation(torch.zeros(1).double()))
    torch.testing.assert_close(without, grey.expand_as(images))


def test_a_third_of_a_turn_of_hue_is_a_change_of_channels():
    images = random_images()[:1]
    third = torch.tensor([2 * math.pi / 3]).double()
    torch.testing.assert_close(color(images, hue(third)), images[:, [2, 0, 1]])
    # red becomes green, as on the wheel
    red = torch.tensor([1.0, 0, 0]).double().view(1, 3, 1, 1)
    turned = color(red, hue(third)).flatten().tolist()
    assert colorsys.rgb_to_hsv(*turned)[0] == pytest.approx(1 / 3)


def test_hue_keeps_grey_and_length():
    images = random_images()
    found = color(images, hue(two(0.5, 2.0)))
    torch.testing.assert_close(found.mean(1), images.mean(1))
    torch.testing.assert_close(found.norm(dim=1), images.norm(dim=1))
