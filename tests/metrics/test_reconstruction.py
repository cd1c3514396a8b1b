"""Reconstruction metrics against closed forms and scikit-image; the same on one rank and on two."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from dinogen.metrics.extractors.base import NotAvailable
from dinogen.metrics.extractors.lpips import load_perceptual
from dinogen.metrics.reconstruction import psnr, reconstruction, ssim
from tests.forked import torchrun
from tests.metrics.backbones import random_images, save_backbone
from tests.metrics.reconstruct import NoisyPairs, measure

SCRIPT = Path(__file__).with_name("reconstruct.py")
NO_LPIPS = NotAvailable("metrics.lpips_backbone: not here")


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return save_backbone("alex", tmp_path_factory.mktemp("backbone") / "alex.pth")


@pytest.fixture(scope="module")
def perceptual(backbone):
    return load_perceptual("alex", str(backbone), torch.device("cpu"))


def columns(pairs, perceptual):
    """Every pair by itself: LPIPS, and PSNR and SSIM by scikit-image."""
    found = {"lpips": [], "psnr": [], "ssim": []}
    for number in range(pairs.num):
        real, made = pairs.read([number])
        found["lpips"].append(float(perceptual.distance(real, made)))
        a, b = real[0].numpy(), made[0].numpy()
        found["psnr"].append(peak_signal_noise_ratio(a, b, data_range=255))
        value = structural_similarity(
            a.astype(float), b.astype(float), channel_axis=0, data_range=255,
            gaussian_weights=True, sigma=1.5, use_sample_covariance=False, win_size=11,
        )  # fmt: skip
        found["ssim"].append(value)
    return found


@pytest.mark.parametrize("batch", [1, 4, 32])
def test_means_and_spreads_are_those_of_every_pair(perceptual, batch):
    pairs = NoisyPairs(7, 32)
    metric_values = reconstruction(pairs, perceptual, batch)
    assert list(metric_values) == [f"reconstruction_{name}" for name in ("lpips", "psnr", "ssim")]
    for name, values in columns(pairs, perceptual).items():
        metric_value = metric_values[f"reconstruction_{name}"]
        assert metric_value.value == pytest.approx(np.mean(values), rel=1e-5)
        assert metric_value.spread == pytest.approx(np.std(values, ddof=1) / math.sqrt(7), rel=1e-4)
        assert (metric_value.num_samples, metric_value.name) == (7, f"reconstruction_{name}")
        assert metric_value.better == ("lower" if name == "lpips" else "higher")


def test_closed_forms():
    a = random_images(1, 16)[0].clamp(0, 200)
    assert psnr(a, a + 5) == pytest.approx(20 * math.log10(255 / 5))
    black, white = torch.zeros(3, 16, 16).byte(), torch.full((3, 16, 16), 255).byte()
    assert psnr(black, white) == 0
    assert ssim(a, a) == pytest.approx(1)
    # two flat images: only the means are left of equation 13
    c1 = (0.01 * 255) ** 2
    assert ssim(black, white) == pytest.approx(c1 / (255**2 + c1), rel=1e-4)


def test_the_same_image_is_as_one_value_off_by_one():
    a = random_images(1, 16)[0].clamp(0, 200)
    off = a.clone()
    off[1, 3, 4] += 1
    assert psnr(a, a) == psnr(a, off) == pytest.approx(10 * math.log10(255**2 * 3 * 16 * 16))


def test_without_lpips_the_others_go_on():
    metric_values = reconstruction(NoisyPairs(3, 16), NO_LPIPS)
    lost = metric_values["reconstruction_lpips"]
    assert lost.value is None and lost.reason == "metrics.lpips_backbone: not here"
    assert metric_values["reconstruction_psnr"].value > 10


def test_images_smaller_than_the_window_have_no_ssim(perceptual):
    metric_values = reconstruction(NoisyPairs(3, 8), perceptual)
    assert metric_values["reconstruction_ssim"].value is None
    assert "smaller than its window of 11x11" in metric_values["reconstruction_ssim"].reason
    assert metric_values["reconstruction_psnr"].value > 10
    assert metric_values["reconstruction_lpips"].value > 0
    assert reconstruction(NoisyPairs(1, 11), NO_LPIPS)["reconstruction_ssim"].value > 0


def test_one_pair_has_no_spread_and_none_is_an_error():
    assert reconstruction(NoisyPairs(1, 16), NO_LPIPS)["reconstruction_psnr"].spread is None
    with pytest.raises(ValueError, match="no reconstructions"):
        reconstruction(NoisyPairs(0, 16), NO_LPIPS)


def test_two_ranks_give_the_same_as_one(backbone, tmp_path):
    """Also where the second has nothing to read; LPIPS diversity with them, for one start."""
    done = torchrun(2, SCRIPT, backbone, tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    alone = [metric_value.to_dict() for metric_value in measure(str(backbone))]
    for rank in range(2):
        together = json.loads((tmp_path / f"{rank}.json").read_text())
        assert len(together) == len(alone) == 7
        for one, other in zip(alone, together, strict=True):
            assert other.keys() == one.keys()
            for key, expected in one.items():
                near = isinstance(expected, float)
                assert other[key] == (pytest.approx(expected, rel=1e-6) if near else expected)
    # the work was shared out: three batches
    assert json.loads((tmp_path / "share.json").read_text()) == [2, 1]
