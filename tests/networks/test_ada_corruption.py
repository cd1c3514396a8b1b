"""Frequency bands, noise and cutout, each against what it should do to a known image."""

import itertools

import numpy as np
import pytest
import pywt
import torch

from dinogen.networks.ada import transforms
from dinogen.networks.ada.transforms import (
    POWER,
    SYM2,
    TransformDraws,
    apply,
    band_gains,
    bands,
)


def amplify(images, gains):
    return apply(images, [transforms.amplify(images, gains[None])])


def add_noise(images, draws, p):
    return apply(images, [transforms.add_noise(images, draws, torch.tensor([[p]]))])


def cut_out(images, draws, p):
    return apply(images, [transforms.cut_out(images, draws, torch.tensor([[p]]))])


def drawn(num, first=0):
    return TransformDraws(0, "ada", torch.arange(first, first + num))


def test_the_filter_is_the_wavelet_sym2():
    np.testing.assert_allclose(SYM2, pywt.Wavelet("sym2").dec_lo, atol=1e-12)


def test_bands_share_the_spectrum_out():
    filters = bands()
    assert filters.shape == (4, 43)
    whole = np.zeros(43)
    whole[21] = 1
    np.testing.assert_allclose(filters.sum(0), whole, atol=1e-12)
    np.testing.assert_allclose(filters, filters[:, ::-1], atol=1e-12)
    n = np.arange(43) - 21
    borders = np.pi * np.array([0, 1 / 8, 1 / 4, 1 / 2, 1])
    for i, (low, high) in enumerate(itertools.pairwise(borders)):
        middle = (low + high) / 2 if i else 0.0
        response = [(row * np.cos(middle * n)).sum() for row in filters]
        assert np.argmax(response) == i
        assert response[i] > 0.7


def test_a_wave_is_multiplied_by_the_gain_of_its_band():
    x = torch.arange(64.0)
    waves = torch.stack([torch.ones(64), torch.cos(torch.pi * x)])  # lowest and highest frequency
    images = waves[:, None, None, :].expand(2, 1, 64, 64)
    gains = torch.tensor([[2.0, 1, 1, 0.5]] * 2).double()
    found = amplify(images, gains)
    # along y both are constant, the lowest band
    expected = torch.stack([images[0] * 2 * 2, images[1] * 0.5 * 2])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_one_changed_band_keeps_the_power_expected():
    gains = band_gains(drawn(200), 0.25)
    changed = torch.stack([drawn(200).happens(f"band_{i}", 0.25) for i in range(4)], 1)
    single = changed.sum(1) == 1
    power = (POWER * gains.square()).sum(1)
    assert single.sum() > 20
    torch.testing.assert_close(power[single], torch.ones(int(single.sum())).double())
    torch.testing.assert_close(gains[~changed.any(1)], torch.ones(200, 4).double()[~changed.any(1)])


def test_noise_has_a_half_normal_deviation():
    grey = torch.zeros(300, 3, 16, 16)
    noise = add_noise(grey, drawn(300), 1.0)
    sigma = noise.flatten(1).std(1).double()
    torch.testing.assert_close(sigma, 0.1 * drawn(300).normal("noise").abs(), rtol=0.2, atol=1e-3)
    assert sigma.square().mean().sqrt() == pytest.approx(0.1, rel=0.15)
    pairs = np.corrcoef(noise.flatten(1)[:10].numpy())
    assert np.abs(pairs - np.eye(10)).max() < 0.2


def test_cutout_by_hand():
    num, size = 50, 16
    found = cut_out(torch.ones(num, 3, size, size), drawn(num), 0.5)
    happens = drawn(num).happens("cutout", 0.5)
    assert 10 < happens.sum() < 40
    for i in range(num):
        expected = np.ones((size, size))
        if happens[i]:
            cx, cy = (float(drawn(num).uniform("cutout", j)[i]) for j in range(2))
            for y in range(size):
                for x in range(size):
                    if abs((x + 0.5) / size - cx) < 0.25 and abs((y + 0.5) / size - cy) < 0.25:
                        expected[y, x] = 0
        np.testing.assert_array_equal(found[i], np.broadcast_to(expected, (3, size, size)))
