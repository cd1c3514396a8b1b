"""Spectra against noise of known power, waves of known length, and images that were blurred."""

from __future__ import annotations

import math

import pytest
import torch

from dinogen.metrics.collect import Moments, Seen
from dinogen.metrics.extractors.spectrum import (
    NUM_BANDS,
    SpectrumExtractor,
    sharpness,
    spectrum_distance,
)
from dinogen.metrics.registry import OF_FEATURES, Sets
from dinogen.metrics.value import halves

EXTRACTOR = SpectrumExtractor(torch.device("cpu"))


def noise(num, side, deviation=30.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    values = 128 + deviation * torch.randn(num, 3, side, side, generator=generator)
    return values.round().clamp(0, 255).to(torch.uint8)


def seen(images, keep=True):
    features = EXTRACTOR(images)["features"]
    return Seen(EXTRACTOR.info, Moments.of(features), features if keep else None)


@pytest.mark.parametrize("side", [16, 64, 65])
def test_white_noise_has_its_variance_in_every_band(side):
    found = EXTRACTOR(noise(400, side))["features"].mean(0)
    assert found[1:].tolist() == pytest.approx([(30 / 255) ** 2] * (NUM_BANDS - 1), rel=0.06)
    # what was taken away with the mean is missing from the coarsest
    assert found[0].tolist() == pytest.approx((30 / 255) ** 2, rel=0.3)


@pytest.mark.parametrize("cycles", [2, 9, 18, 30])
def test_a_wave_is_in_the_band_of_its_length(cycles):
    across = 0.3 * torch.sin(2 * math.pi * cycles * torch.arange(64) / 64)
    image = ((0.5 + across) * 255).round().to(torch.uint8).expand(1, 3, 64, 64)
    found = EXTRACTOR(image)["features"][0]
    band = cycles * NUM_BANDS // 32
    assert found.argmax() == band
    assert found[band] > 100 * found[[b for b in range(NUM_BANDS) if abs(b - band) > 1]].max()


@pytest.mark.parametrize("side", [4, 8])
def test_small_images_have_bands_without_frequencies_that_count_nothing(side):
    one, other = (EXTRACTOR(noise(200, side, seed=seed))["features"].mean(0) for seed in (0, 1))
    assert 0 < int((one == 0).sum()) < NUM_BANDS
    assert 0 <= spectrum_distance(one, other) < 1
    assert sharpness(one, other) == pytest.approx(1, abs=0.1)


def test_half_the_contrast_is_six_decibels():
    real, found = (EXTRACTOR(noise(200, 32, d))["features"].mean(0).double() for d in (40, 20))
    assert spectrum_distance(found, real) == pytest.approx(20 * math.log10(2), abs=0.1)
    assert sharpness(found, real) == pytest.approx(0.25, rel=0.03)


def test_a_image_of_one_colour_is_far_and_not_infinitely():
    real = EXTRACTOR(noise(9, 32))["features"].mean(0)
    flat = EXTRACTOR(torch.full((9, 3, 32, 32), 77, dtype=torch.uint8))["features"].mean(0)
    assert 30 < spectrum_distance(flat, real) < 60
    assert sharpness(flat, real) < 1e-9


def test_blurred_photos_are_less_sharp_than_photos_and_noisy_ones_sharper():
    from skimage import data

    photo = torch.from_numpy(data.astronaut()[:256, :256]).permute(2, 0, 1)[None].float()
    blurred = torch.nn.functional.avg_pool2d(photo, 3, 1, 1)
    generator = torch.Generator().manual_seed(0)
    noisy = photo + 20 * torch.randn(photo.shape, generator=generator)
    real, soft, rough = (
        EXTRACTOR(x.round().clamp(0, 255).to(torch.uint8))["features"].mean(0)
        for x in (photo, blurred, noisy)
    )
    assert sharpness(soft, real) < 0.5 < 1 < 1.5 < sharpness(rough, real)
    assert sharpness(real, real) == 1 and spectrum_distance(real, real) == 0


def test_the_spread_is_that_of_halves():
    generated, real = seen(noise(60, 16)), seen(noise(60, 16, seed=1), keep=False)
    sets = Sets(generated, real, None, 10, 0)
    for name, compare in (("spectrum", spectrum_distance), ("sharpness", sharpness)):
        estimate = OF_FEATURES[name].estimate(sets)
        means = [generated.features[half].double().mean(0) for half in halves(60, 10, 0)]
        values = torch.tensor([compare(mean, real.moments.mean()) for mean in means])
        assert estimate.value == compare(generated.moments.mean(), real.moments.mean())
        assert estimate.spread == pytest.approx(float(values.std()))
    without = Sets(seen(noise(60, 16), keep=False), real, None, 0, 0)
    assert OF_FEATURES["spectrum"].estimate(without).spread is None
