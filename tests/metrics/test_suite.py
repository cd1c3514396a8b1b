"""The suite: all metrics from one look at each image; what is missing leaves the others alone."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from dinogen.config.training import MetricsConfig
from dinogen.errors import ConfigError, UserError
from dinogen.metrics.registry import GUIDE_DIVERSITY, NAMES, better, chosen_names
from dinogen.metrics.sources import Folder, Generated, Images, Reconstructed
from dinogen.metrics.suite import Extractors, Subject, measure
from dinogen.runs.fingerprint import differences
from tests.metrics.small import Means, only, pack_images, save_images, small_data

ABSENT = UserError("there is none: give it")
ALL = [name for name in NAMES if name != GUIDE_DIVERSITY]  # which a family measures itself
OF_MEANS = [
    "fid768",
    "kid768",
    "precision768",
    "recall768",
    "density768",
    "coverage768",
    "memorisation768",
]


class Counted(Generated):
    """Noise, of which every image made is remembered."""

    def __init__(self, num, resolution=16):
        self.numbers = []

        def sample(indices):
            self.numbers += indices.tolist()
            return torch.stack(
                [
                    torch.rand(
                        3, resolution, resolution, generator=torch.Generator().manual_seed(i)
                    )
                    for i in indices.tolist()
                ]
            )

        super().__init__(sample, num, resolution)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return small_data(tmp_path_factory.mktemp("suite") / "data")


@pytest.fixture
def extractor(monkeypatch):
    return only(monkeypatch, Means())


def of(data, split, num=None, resolution=16):
    return Images(data, split, range(num or data.num_samples(split)), resolution)


def subject(data, generated=None, **changes):
    real = of(data, "val")
    parts = {
        "generated": generated or Counted(60),
        "real": real,
        "train": of(data, "train"),
        "pairs": Reconstructed(real, lambda images, numbers: images),
        "prompted": UserError("not requested"),
    }
    return Subject(**(parts | changes))


def suite(names, what, tmp_path, num_halves=0):
    extractors = Extractors(MetricsConfig(), torch.device("cpu"))
    return measure(names, extractors, what, num_halves, tmp_path / "cache")


def test_every_image_is_made_once_and_measured_once(data, extractor, tmp_path):
    what = subject(data)
    found = suite(ALL, what, tmp_path, num_halves=4)
    assert sorted(what.generated.numbers) == list(range(60))
    assert extractor.num_seen == 60 + what.real.num + what.train.num
    assert list(found.metric_values) == ALL
    there = {
        name for name, metric_value in found.metric_values.items() if metric_value.value is not None
    }
    assert there == {*OF_MEANS, "reconstruction_psnr", "reconstruction_ssim"}
    for name in OF_MEANS:
        metric_value = found.metric_values[name]
        assert (metric_value.num_samples, metric_value.num_reference) == (60, what.real.num)
        assert metric_value.spread is not None and metric_value.better == better(name)
        assert found.fingerprints[metric_value.fingerprint]["judge"] == "inception768"
    # noise is not discs
    assert found.metric_values["fid768"].value > 100 * found.metric_values["fid768"].spread
    assert found.metric_values["recall768"].value == found.metric_values["precision768"].value == 0
    assert found.metric_values["memorisation768"].value > 2


def test_a_value_by_a_network_that_guided_the_run_says_so(data, extractor, tmp_path):
    def cautions(guides):
        found = suite(["fid768"], subject(data, guides=guides), tmp_path).metric_values
        return found["fid768"].caution

    assert "inception768 guided the training" in cautions(("pixels", "inception"))
    assert "guided" not in cautions(("onet", "pixels"))


def test_what_is_missing_says_why_and_how_to_fix_it(data, extractor, tmp_path):
    what = subject(data, real=ABSENT, train=ABSENT, pairs=ABSENT)
    found = suite(ALL, what, tmp_path)
    assert not found.made and what.generated.numbers == [] and found.fingerprints == {}
    reasons = {name: metric_value.reason for name, metric_value in found.metric_values.items()}
    assert reasons["fid"] == reasons["is"] == "metrics.inception: no path is given"
    assert reasons["fid768"] == reasons["reconstruction_psnr"] == str(ABSENT)
    assert "metrics.lpips_backbone" in reasons["lpips_diversity"]
    assert all(metric_value.value is None for metric_value in found.metric_values.values())
    # without the training images, everything but memorisation is available
    found = suite(OF_MEANS, subject(data, train=ABSENT), tmp_path)
    missing = [
        name for name, metric_value in found.metric_values.items() if metric_value.value is None
    ]
    assert missing == ["memorisation768"]


def test_a_set_against_itself(data, extractor, tmp_path):
    floats = of(data, "val").read(list(range(data.num_samples("val")))).float() / 127.5 - 1
    itself = Generated(lambda numbers: floats[numbers], len(floats), 16)
    found = suite(OF_MEANS, subject(data, itself), tmp_path).metric_values
    assert found["fid768"].value == pytest.approx(0, abs=1e-6)
    assert found["precision768"].value == found["coverage768"].value == 1
    assert found["memorisation768"].value == pytest.approx(1)


def test_a_frechet_distance_by_hand(data, extractor, tmp_path):
    """From the images' own means and deviations, by scipy's matrix root."""
    from scipy.linalg import sqrtm

    what = subject(data)
    found = suite(["fid768"], what, tmp_path).metric_values["fid768"]
    rows = [
        Means()(source.read(list(range(source.num))))["features"].double().numpy()
        for source in (Counted(60), what.real)
    ]
    (a, b), (s, t) = [x.mean(0) for x in rows], [np.cov(x, rowvar=False) for x in rows]
    expected = ((a - b) ** 2).sum() + np.trace(s + t - 2 * sqrtm(s @ t).real)
    assert found.value == pytest.approx(expected, rel=1e-6)
    assert found.spread is None, "none was requested, and no rows are kept"


def test_reconstructions_that_are_the_images_themselves(data, extractor, tmp_path):
    names = ["reconstruction_psnr", "reconstruction_ssim", "reconstruction_lpips"]
    found = suite(names, subject(data), tmp_path)
    assert found.metric_values["reconstruction_ssim"].value == pytest.approx(1)
    assert found.metric_values["reconstruction_psnr"].value > 60
    assert "metrics.lpips_backbone" in found.metric_values["reconstruction_lpips"].reason
    assert not found.made, "nothing has to be generated for it"
    facts = found.fingerprints[found.metric_values["reconstruction_ssim"].fingerprint]
    assert (facts["split"], facts["num_reference"]) == ("val", data.num_samples("val"))


def test_too_few_images_are_a_reason(data, extractor, tmp_path):
    found = suite(["fid768", "precision768"], subject(data, Counted(1)), tmp_path)
    for metric_value in found.metric_values.values():
        assert metric_value.value is None and metric_value.fingerprint is None
        assert "takes" in metric_value.reason
    assert found.fingerprints == {}


def mutations(data, tmp_path):
    """Runs that were fed something else, and what has to be said of each."""
    nearest = [image[::2, ::2].copy() for image in np.repeat(np.repeat(IMAGES, 2, 1), 2, 2)]
    nearest[0][0, 0] += 1
    shrunk = pack_images(tmp_path / "nearest", nearest)
    yield "data", subject(data, real=of(shrunk, "val")), None
    yield "split", subject(data, real=of(data, "test", 8)), None
    yield "num_samples", subject(data, Counted(30)), None
    yield "num_reference", subject(data, real=of(data, "val", 7)), None
    yield "resize", subject(data), Means(resize="nearest 4")
    yield "weights_sha256", subject(data), Means(weights="c" * 64)
    small = subject(data, Counted(60, 8), real=of(data, "val", resolution=8))
    yield "resolution", small, None


IMAGES = np.random.default_rng(0).integers(0, 255, (48, 16, 16, 3), np.uint8)


def test_a_run_fed_something_else_is_flagged(data, extractor, tmp_path, monkeypatch):
    """A wrong filter, a wrong split, too few samples: none passes for the same measurement."""
    sound = suite(["fid768"], subject(data), tmp_path)
    (mark,) = sound.fingerprints
    again = suite(["fid768"], subject(data), tmp_path)
    assert again.metric_values == sound.metric_values and list(again.fingerprints) == [mark]
    seen = {mark}
    for key, what, other in mutations(data, tmp_path):
        only(monkeypatch, other or Means())
        found = suite(["fid768"], what, tmp_path)
        metric_value = found.metric_values["fid768"]
        assert metric_value.value is not None
        told = differences(found.fingerprints[metric_value.fingerprint], sound.fingerprints[mark])
        assert any(phrase.startswith(f"{key}: ") for phrase in told), (key, told)
        assert metric_value.fingerprint not in seen
        seen.add(metric_value.fingerprint)


def test_files_of_a_reference_are_enough(data, extractor, tmp_path):
    real = Folder(save_images(list(IMAGES[:9]), tmp_path / "files"))
    found = suite(["fid768"], subject(data, real=real), tmp_path)
    (facts,) = found.fingerprints.values()
    assert facts["resize"] == "none, then box 4" and facts["num_reference"] == 9
    assert math.isfinite(found.metric_values["fid768"].value)


def test_names_are_checked_and_come_in_the_order_of_the_table():
    assert chosen_names(["kid", "fid"], "x") == ("fid", "kid")
    assert chosen_names([], "x") == NAMES and len(set(NAMES)) == len(NAMES)
    with pytest.raises(ConfigError, match=r"eval.generated: no metric 'fid_768': did you mean fid"):
        chosen_names(["fid_768"], "eval.generated")
