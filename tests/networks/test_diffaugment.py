"""Differentiable augmentation against the same arithmetic by hand."""

import numpy as np
import pytest
import torch

from dinogen.distributed import rng
from dinogen.networks.ada.transforms import TRANSFORMS
from dinogen.networks.diffaugment import diff_augment

SIZE = 16
ALL = ("color", "translation", "cutout")


def random_images(num=6):
    return torch.rand(num, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0)) * 2 - 1


def run(images, transforms=ALL, first=0, purpose="judge"):
    positions = torch.arange(first, first + len(images))
    return diff_augment(images, 7, purpose, positions, transforms)


def drawn(position, name):
    """The two numbers of a sample's transform."""
    table = rng.uniform(7, "judge", torch.tensor([position]), (len(TRANSFORMS), 3))[0].double()
    return table[TRANSFORMS.index(name), 1:].tolist()


def test_of_no_transforms_the_very_same_images_come_back():
    images = random_images()
    assert run(images, ()) is images


def test_colour_is_brightness_then_saturation_then_contrast():
    images = random_images()
    out = run(images, ("color",)).numpy()
    for i, x in enumerate(images.double().numpy()):
        x = x + drawn(i, "brightness")[0] - 0.5
        grey = x.mean(0, keepdims=True)
        x = grey + (x - grey) * 2 * drawn(i, "saturation")[0]
        x = x * (0.5 + drawn(i, "contrast")[0])
        np.testing.assert_allclose(out[i], x, atol=1e-5)


def test_translation_moves_whole_pixels_and_mirrors_at_the_border():
    images = random_images(24)
    out = run(images, ("translation",)).numpy()
    shifts = set()
    for i, x in enumerate(images.numpy()):
        right, down = (round((2 * u - 1) * SIZE / 8) for u in drawn(i, "translate_whole"))
        shifts.add((right, down))
        padded = np.pad(x, ((0, 0), (2, 2), (2, 2)), mode="reflect")
        expected = padded[:, 2 - down : 2 - down + SIZE, 2 - right : 2 - right + SIZE]
        np.testing.assert_array_equal(out[i], expected)
    assert len(shifts) > 8


def test_cutout_greys_at_most_a_quarter_and_nothing_else():
    images = random_images(24)
    out = run(images, ("cutout",))
    grey = (out == 0).all(1)
    assert torch.equal(torch.where(grey[:, None], images, out), images)
    num = grey.flatten(1).sum(1)
    assert num.max() == (SIZE // 2) ** 2
    assert num.min() > 0


def test_two_halves_are_the_whole_to_the_bit():
    images = random_images(8)
    halves = torch.cat([run(images[:5]), run(images[5:], first=5)])
    assert torch.equal(halves, run(images))


def test_one_position_s_images_are_changed_alike_and_purposes_differ():
    image = random_images(1)
    positions = torch.tensor([3, 3, 4])
    out = diff_augment(image.repeat(3, 1, 1, 1), 7, "judge", positions, ALL)
    assert torch.equal(out[0], out[1])
    assert not torch.allclose(out[0], out[2], atol=0.05)
    assert not torch.allclose(run(image), run(image, purpose="other"), atol=0.05)


def test_it_is_float32_under_autocast():
    images = random_images()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(run(images), run(images.clone()))
    assert run(images.double()).dtype == torch.float32


@pytest.mark.parametrize("transform", ALL)
def test_gradients_reach_the_images_and_can_be_differentiated_again(transform):
    # each is linear but for a constant, so |A x + b|^2 has the constant second derivative 2 A'A
    images = random_images(3).requires_grad_()
    out = run(images, (transform,))
    (gradient,) = torch.autograd.grad(out.square().sum(), images, create_graph=True)
    assert gradient.flatten(1).norm(dim=1).min() > 0
    step = torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    (along,) = torch.autograd.grad((gradient * step).sum(), images)
    moved = run(images.detach() + step, (transform,)) - out.detach()
    torch.testing.assert_close((along * step).sum(), 2 * moved.square().sum(), rtol=1e-3, atol=1e-3)
