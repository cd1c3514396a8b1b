"""LPIPS diversity against all pairs one by one, its spread against leaving images out."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from dinogen.metrics import lpips_diversity as module
from dinogen.metrics.extractors.lpips import load_perceptual
from dinogen.metrics.lpips_diversity import lpips_diversity, pairwise_distances
from tests.metrics.backbones import random_images, save_backbone


@pytest.fixture(scope="module")
def perceptual(tmp_path_factory):
    path = save_backbone("alex", tmp_path_factory.mktemp("backbone") / "alex.pth")
    return load_perceptual("alex", str(path), torch.device("cpu"))


def by_pairs(images, perceptual):
    """Each pair by itself."""
    pairs = itertools.combinations(range(len(images)), 2)
    return {
        (i, j): float(perceptual.distance(images[i : i + 1], images[j : j + 1])) for i, j in pairs
    }


def test_it_is_the_mean_of_all_pairs_and_its_spread_that_of_leaving_one_out(perceptual):
    images = random_images(6, 32)
    pairs = by_pairs(images, perceptual)
    metric_value = lpips_diversity(images, perceptual)
    assert metric_value.value == pytest.approx(np.mean(list(pairs.values())), rel=1e-5)
    without = [
        np.mean([distance for pair, distance in pairs.items() if left_out not in pair])
        for left_out in range(6)
    ]
    jackknife = math.sqrt(5 / 6 * np.square(without - np.mean(without)).sum())
    assert metric_value.spread == pytest.approx(jackknife, rel=1e-4)
    assert (metric_value.name, metric_value.better, metric_value.num_samples) == (
        "lpips_diversity",
        "higher",
        6,
    )


def test_its_spread_is_what_other_draws_differ_by(perceptual):
    """Of 30 draws of 12 images the metric values spread as each of them says, within chance."""
    images = random_images(360, 16)
    metric_values = [lpips_diversity(part, perceptual) for part in images.split(12)]
    spread = np.std([metric_value.value for metric_value in metric_values], ddof=1)
    said = np.mean([metric_value.spread for metric_value in metric_values])
    assert 0.6 < said / spread < 1.7


def test_blocks_change_nothing(perceptual, monkeypatch):
    images = random_images(7, 32)
    whole = pairwise_distances(images, perceptual)
    assert torch.equal(whole, whole.T) and torch.equal(whole.diagonal(), torch.zeros(7).double())
    num_bytes = 4 * perceptual.embed(images[:1]).shape[1]
    monkeypatch.setattr(module, "MAX_BYTES", 3 * num_bytes)
    monkeypatch.setattr(module, "PART", 2)
    torch.testing.assert_close(pairwise_distances(images, perceptual), whole, rtol=1e-4, atol=1e-7)


def test_one_image_over_and_over_has_none(perceptual):
    metric_value = lpips_diversity(random_images(1, 32).expand(5, -1, -1, -1), perceptual)
    assert metric_value.value == pytest.approx(0, abs=1e-9)
    assert metric_value.spread == pytest.approx(0, abs=1e-9)


def test_few_images(perceptual):
    assert lpips_diversity(random_images(2, 32), perceptual).spread is None
    metric_value = lpips_diversity(random_images(1, 32), perceptual)
    assert metric_value.value is None and "generate two or more" in metric_value.reason
