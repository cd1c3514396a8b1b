"""Images as metrics are measured on: classes as frequent as in the data, noise of each image."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dinogen.evaluation.evaluate import evaluate
from dinogen.families.base import classes_of
from dinogen.families.registry import family_class
from dinogen.metrics.extractors.base import ExtractorInfo
from dinogen.metrics.value import fingerprint
from dinogen.runs.fingerprint import fingerprint_id
from dinogen.training.data import class_shares
from dinogen.training.run import train
from shards import open_dataset, pack
from shards.format.sample import Sample

from .tiny import pack_discs, tiny_config

EXTRACTOR = ExtractorInfo("onet", "ab", "none", 4, 0, False)


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    """15 discs, 12 of class 0 and 3 of class 1."""
    place = tmp_path_factory.mktemp("uneven")
    pack_discs(place / "all")
    data = open_dataset(place / "all")
    labels = [0] * 12 + [1] * 3
    found = [data.sample(number) for number in range(15)]
    pack(
        [Sample(f"d{n:02d}", s.image, "png", {}, {}, label=labels[n]) for n, s in enumerate(found)],
        place / "data",
        shard_size=8,
    )
    return place / "data"


def build(name, data, tmp_path, *more):
    config = tiny_config(name, data, tmp_path, *more)
    torch.manual_seed(0)
    family = family_class(config.family)(config, config.stages[0], torch.device("cpu"))
    for parameter in family.G.parameters():
        parameter.data.add_(0.2 * torch.randn(parameter.shape))  # much is 0 before training
    family.G.eval()
    return family, {"G": family.G}


@pytest.mark.parametrize("shares", [(0.5, 0.3, 0.2), (1.0, 0.0, 0.0), (1, 2, 97), (1.0,)])
@pytest.mark.parametrize("start", [0, 12_345_678])
def test_any_run_of_numbers_has_the_shares_of_the_data(shares, start):
    for num in (200, 5000):
        found = classes_of(torch.arange(start, start + num), shares)
        counts = np.bincount(found.numpy(), minlength=len(shares))
        wanted = np.array(shares) / sum(shares) * num
        assert np.abs(counts - wanted).max() <= 1 + 2 * np.log2(num)
        assert all(count == 0 for count, share in zip(counts, shares, strict=True) if not share)


def test_the_shares_are_counted_in_what_is_trained_on(uneven, tmp_path):
    family, _ = build("ddpm", uneven, tmp_path, "family.num_classes=2")
    assert class_shares(family, open_dataset(uneven)) == pytest.approx((0.8, 0.2))


@pytest.mark.parametrize("name", ["ddpm", "ddpm-edm", "flow", "flow-dit", "stylegan2_ada"])
def test_classes_go_by_their_shares(name, uneven, tmp_path):
    family, networks = build(name, uneven, tmp_path, "family.num_classes=2")
    numbers = torch.arange(6)
    with torch.no_grad():
        only = [family.measured(networks, numbers, 0, (1 - c, c)) for c in (0, 1)]
        mixed = family.measured(networks, numbers, 0, (5 / 6, 1 / 6))
    chosen = classes_of(numbers, (5 / 6, 1 / 6)).tolist()
    for number, label in enumerate(chosen):
        assert torch.allclose(mixed[number], only[label][number], atol=1e-5)
    assert not torch.allclose(only[0], only[1], atol=1e-4)


def test_each_image_has_its_own_noise_whatever_is_drawn_with_it(uneven, tmp_path):
    family, networks = build("stylegan2_ada", uneven, tmp_path)
    numbers = torch.arange(5)
    with torch.no_grad():
        together = family.measured(networks, numbers, 0, None)
        alone = torch.cat([family.measured(networks, one[None], 0, None) for one in numbers])
        constant = family.sample(networks, numbers, 0)
        z = family.latents(torch.zeros(5, dtype=torch.int64), 0)
        same_z = networks["G"](z)
    assert torch.allclose(together, alone, atol=1e-5)
    assert not torch.allclose(together, constant, atol=1e-3)
    assert torch.allclose(same_z[0], same_z[1], atol=1e-5)  # what differs is the noise
    assert family.measured_as == {"noise": "per image"}


def test_only_where_images_are_drawn_otherwise_is_the_fingerprint_another():
    plain = fingerprint(EXTRACTOR, 16, 20)
    assert "sampling" not in plain
    assert fingerprint_id(fingerprint(EXTRACTOR, 16, 20, sampling={})) == fingerprint_id(plain)
    shares = [
        fingerprint(EXTRACTOR, 16, 20, sampling={"classes": s}) for s in ([0.5, 0.5], [0.9, 0.1])
    ]
    assert len({fingerprint_id(one) for one in (plain, *shares)}) == 3


def test_an_evaluation_says_how_its_images_were_drawn(uneven, tmp_path):
    more = ("family.num_classes=2", "stages.0.kimg=0.008")
    config = tiny_config("stylegan2_ada", uneven, tmp_path / "run", *more)
    train(config)
    found = evaluate(config.run, num_samples=12, names=["faces"])
    (facts,) = found["fingerprints"].values()
    assert facts["sampling"] == {"noise": "per image", "classes": [0.8, 0.2]}
    uneven.rename(tmp_path / "gone")
    try:
        lost = evaluate(config.run, num_samples=12, names=["faces"])
    finally:
        (tmp_path / "gone").rename(uneven)
    (facts,) = lost["fingerprints"].values()
    assert facts["sampling"]["classes"] == "in turn"
