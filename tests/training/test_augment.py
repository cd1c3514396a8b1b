"""Augmentations against torchvision's, and drawn by position alone."""

import numpy as np
import pytest
import torch

from dinogen._torchvision import ensure_torchvision
from dinogen.config import AugmentConfig
from dinogen.training.dataloading import (
    augment,
    brightness,
    contrast,
    flip,
    in_unit_range,
    rotate,
    saturation,
)
from dinogen.training.run import train
from shards.image.decode import write_into
from tests.families.tiny import discs, pack_discs, tiny_config
from tests.training.helpers import weights

ensure_torchvision()
functional = pytest.importorskip("torchvision.transforms.v2.functional")

FACTORS = torch.tensor([0.6, 1.0, 1.3, 0.95])
ALL = AugmentConfig(flip=0.5, rotate=5, brightness=0.1, contrast=0.1, saturation=0.05)


def random_images(num: int = 4) -> torch.Tensor:
    """Smooth enough that two ways to interpolate agree."""
    stack = [torch.from_numpy(pixels).permute(2, 0, 1) for pixels in discs(num, 32)]
    images = torch.stack(stack).float() / 127.5 - 1
    return torch.nn.functional.avg_pool2d(images, 5, 1, 2, count_include_pad=False)


def augmented(images: torch.Tensor, positions: torch.Tensor, seed: int, config: AugmentConfig):
    batch = {"image": images, "position": positions}
    return augment(batch, seed, config, images.device)["image"]


@pytest.mark.parametrize(
    ("mine", "theirs"),
    [
        (brightness, functional.adjust_brightness),
        (contrast, functional.adjust_contrast),
        (saturation, functional.adjust_saturation),
    ],
    ids=["brightness", "contrast", "saturation"],
)
def test_colours_as_in_torchvision(mine, theirs):
    images = random_images()
    expected = [
        theirs((image + 1) / 2, factor) * 2 - 1
        for image, factor in zip(images, FACTORS.tolist(), strict=True)
    ]
    torch.testing.assert_close(mine(images, FACTORS), torch.stack(expected), atol=2e-4, rtol=0)


def test_rotation_as_in_torchvision():
    images, degrees = random_images(), torch.tensor([-5.0, 0.0, 3.0, 10.0])
    bilinear = functional.InterpolationMode.BILINEAR
    expected = torch.stack(
        [
            functional.rotate(image, angle, interpolation=bilinear)
            for image, angle in zip(images, degrees.tolist(), strict=True)
        ]
    )
    found = rotate(images, degrees)
    inside = (..., slice(4, -4), slice(4, -4))  # torchvision puts black beyond the border
    torch.testing.assert_close(found[inside], expected[inside], atol=1e-3, rtol=0)
    assert found.min() >= images.min(), "the border is mirrored, not black"


def test_a_mirror_image_is_one():
    images = random_images()
    found = flip(images, torch.tensor([True, False, True, False]))
    assert torch.equal(found[::2], images[::2].flip(3))
    assert torch.equal(found[1::2], images[1::2])


def test_what_is_drawn_depends_on_the_position_alone():
    images = random_images(1).expand(64, -1, -1, -1)
    positions = torch.arange(64) + 1000
    whole = augmented(images, positions, 5, ALL)
    parts = [augmented(images[i::3], positions[i::3], 5, ALL) for i in range(3)]
    for i, part in enumerate(parts):
        torch.testing.assert_close(whole[i::3], part)
    assert (whole[0] - whole[1]).abs().max() > 1e-3
    assert (whole - augmented(images, positions, 6, ALL)).abs().max() > 1e-3
    assert whole.abs().max() <= 1
    assert torch.equal(augmented(images, positions, 5, AugmentConfig()), images)


def test_the_batch_says_which_images_are_mirrored():
    images, positions = random_images(1).expand(64, -1, -1, -1), torch.arange(64) + 1000
    batch = {"image": images, "position": positions}
    changed = augment(batch, 5, AugmentConfig(flip=0.3), images.device)
    mirrored = [not torch.equal(one, images[0]) for one in changed["image"]]
    assert changed["flipped"].tolist() == mirrored and 10 < sum(mirrored) < 30
    bare = augment({"position": positions}, 5, AugmentConfig(flip=0.3), images.device)
    assert list(bare) == ["flipped"] and torch.equal(bare["flipped"], changed["flipped"])
    assert "flipped" not in augment(batch, 5, AugmentConfig(rotate=5), images.device)


def test_a_run_that_mirrors_everything_equals_a_run_on_mirror_images(tmp_path, monkeypatch):
    pack_discs(tmp_path / "plain")
    monkeypatch.setattr("tests.families.tiny.discs", lambda *of: [d[:, ::-1] for d in discs(*of)])
    pack_discs(tmp_path / "mirrored")
    one = tiny_config("dcgan", tmp_path / "plain", tmp_path / "one", "augment.flip=1")
    two = tiny_config("dcgan", tmp_path / "mirrored", tmp_path / "two")
    none = tiny_config("dcgan", tmp_path / "plain", tmp_path / "none")
    for config in (one, two, none):
        train(config)
    a, b, c = (weights(config, 16) for config in (one, two, none))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert any(not torch.equal(a[name], c[name]) for name in a)


def test_images_sent_as_bytes_are_what_the_reader_makes_of_them():
    pixels = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, 2)
    read, sent = np.empty((3, 16, 16), np.float32), np.empty((3, 16, 16), np.uint8)
    write_into(pixels, read)
    write_into(pixels, sent)
    assert np.array_equal(in_unit_range(torch.from_numpy(sent)).numpy(), read)
