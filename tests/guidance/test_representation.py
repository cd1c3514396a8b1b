"""The generated feature: R against a known distribution, statistics, draws, what is refused."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from dinogen.config import ConfigError
from dinogen.distributed import rng
from dinogen.guidance import representation
from dinogen.guidance.representation import Representation, RepresentationOptions
from dinogen.networks.representation import RepresentationMLP
from shards.read.dataset import open_dataset
from shards.read.mixture import MixedDataset
from tests.families.tiny import pack_discs

CPU = torch.device("cpu")
# Centres of a mixture of two round Gaussians in the plane, its shares and their deviation.
CENTRES = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
SHARES, DEVIATION = (0.25, 0.75), 0.2


def of(seed=0, **options):
    return Representation(RepresentationOptions(**options), seed, CPU)


def mixture(num, seed):
    """(N, 2) points, and which Gaussian each is of."""
    generator = torch.Generator().manual_seed(seed)
    which = (torch.rand(num, generator=generator) < SHARES[1]).long()
    return CENTRES[which] + DEVIATION * torch.randn(num, 2, generator=generator), which


def trained(num_classes, steps=600, size=256):
    made = of(level="clip", channels=2, width=64, depth=2, steps=12)
    torch.manual_seed(0)
    R = RepresentationMLP(**made.arguments(num_classes))
    points, which = mixture(100_000, 0)
    R.mean.copy_(points.mean(0))
    R.std.copy_(points.std(0))
    optimizer = torch.optim.Adam(R.parameters(), lr=2e-3)
    for step in range(steps):
        position = torch.arange(step * size, (step + 1) * size)
        rows = position % len(points)
        label = which[rows] if num_classes else None
        batch = {"clip": points[rows], "position": position}
        (loss,) = made.losses({"R": R}, batch, label, "").values()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * (1 - step / steps)
    return made, R


def generated(made, R, label=None, num=4000):
    return made.generate({"R": R}, made.noise(torch.arange(num), 1), label) * R.std + R.mean


def test_it_learns_a_mixture_with_the_right_shares_and_spread():
    found = generated(*trained(0))
    nearest = torch.cdist(found, CENTRES).argmin(1)
    assert nearest.float().mean() == pytest.approx(SHARES[1], abs=0.04)
    for mode, centre in enumerate(CENTRES):
        own = found[nearest == mode]
        torch.testing.assert_close(own.mean(0), centre, atol=0.06, rtol=0)
        assert float(own.std(0).mean()) == pytest.approx(DEVIATION, abs=0.06)
    near = (found - CENTRES[nearest]).norm(dim=1) < 4 * DEVIATION
    assert near.float().mean() > 0.97, "hardly anything lies between the two"


def test_with_classes_it_generates_what_the_class_says():
    made, R = trained(2, steps=300)
    label = torch.arange(1000) % 2
    found = generated(made, R, label, 1000)
    assert (torch.cdist(found, CENTRES).argmin(1) == label).float().mean() > 0.97


def test_the_loss_by_hand_and_for_any_parts_of_the_batch():
    made = of(level="clip", channels=5, width=8, depth=1)
    torch.manual_seed(0)
    R = RepresentationMLP(**made.arguments(0))
    torch.nn.init.normal_(R.last.weight)
    embedding, position = torch.randn(4, 5), torch.tensor([0, 3, 9, 2**33])
    t = rng.uniform(0, "R/t/x", position)
    eps = rng.normal(0, "R/eps/x", position, (5,))
    errors = [
        R(((1 - a) * x + a * e)[None], 1000 * a[None])[0] - (e - x)
        for x, e, a in zip(embedding, eps, t, strict=True)
    ]
    batch = {"clip": embedding, "position": position}
    whole = made.losses({"R": R}, batch, None, "/x")["representation"]
    torch.testing.assert_close(whole, torch.stack(errors).square().mean())


def test_samples_do_not_depend_on_each_other_and_begin_at_the_noise():
    made = of(channels=5, width=8, depth=1, steps=2)
    R = RepresentationMLP(**made.arguments(0))
    noise = torch.randn(3, 5)
    assert torch.equal(made.generate({"R": R}, noise, None), noise), "a new R moves nothing"
    torch.nn.init.normal_(R.last.weight)
    found = made.generate({"R": R}, noise, None)
    torch.testing.assert_close(made.generate({"R": R}, noise[1:2], None), found[1:2])
    assert (found - noise).abs().max() > 0.1


def test_about_the_share_of_dropout_is_dropped_by_position():
    made = of(dropout=0.3)
    position = torch.arange(20_000)
    kept = made.keep(position, "")
    assert kept.float().mean() == pytest.approx(0.7, abs=0.015)
    assert torch.equal(made.keep(position[7:9], ""), kept[7:9])
    assert of(dropout=0.0).keep(position, "").all()


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """24 samples with levels of several sizes, whose means are the same."""
    folder, generator = tmp_path_factory.mktemp("levels"), np.random.default_rng(0)
    levels = []
    for _ in range(24):
        p4 = generator.normal(3.0, [1.0, 0.5, 0.0], (16, 3)).astype(np.float16)
        p4 += generator.normal(0.0, [2.0, 1.0, 0.0], 3).astype(np.float16)
        p1 = p4.astype(np.float32).mean(0, keepdims=True).astype(np.float16)
        vector = generator.normal(size=(1, 3)).astype(np.float16)
        levels.append({"p4": p4, "p1": p1, "clip": vector, "other.p4": 2 * p4})
    pack_discs(folder / "data", levels)
    return open_dataset(folder / "data")


@pytest.mark.parametrize("level", ["p1", "p4", "clip", "other.p4"])
def test_over_the_training_images_it_has_mean_0_and_deviation_1(packed, level):
    made = of(level=level, channels=3, width=4, depth=1)
    R = RepresentationMLP(**made.arguments(0))
    made.begin(R, packed, "train", "stop")
    found = made.embedding(
        {"R": R}, packed.read(range(packed.num_samples("train")), levels=[level])
    )
    varies = slice(None) if level == "clip" else slice(2)
    torch.testing.assert_close(found.mean(0), torch.zeros(3), atol=3e-3, rtol=0)
    spread = found.std(0, unbiased=False)[varies]
    torch.testing.assert_close(spread, torch.ones_like(spread), atol=3e-3, rtol=0)
    assert found.isfinite().all(), "a channel that does not vary is not divided by 0"
    again = RepresentationMLP(**made.arguments(0))
    again.load_state_dict(R.state_dict())
    assert torch.equal(again.std, R.std), "a checkpoint carries the statistics"


def test_the_mean_of_a_larger_level_is_p1(packed):
    batch = packed.read(range(6), levels=["p1"]), packed.read(range(6), levels=["p4"])
    R = RepresentationMLP(3, 4, 1)
    one, four = (
        of(level=n, channels=3).embedding({"R": R}, b)
        for n, b in zip(["p1", "p4"], batch, strict=True)
    )
    torch.testing.assert_close(one, four, atol=5e-3, rtol=1e-3)


def test_the_deviation_is_measured_on_samples_of_the_whole_split(packed, monkeypatch):
    read = []
    monkeypatch.setattr(representation, "NUM_MEASURED", 5)
    monkeypatch.setattr(
        type(packed), "read", lambda self, n, **more: read.append(list(n)) or packed_read(n, **more)
    )
    packed_read = super(type(packed), packed).read
    made = of(level="p4", channels=3)
    made.begin(RepresentationMLP(3, 4, 1), packed, "train", "stop")
    last = packed.num_samples("train") - 1
    assert len(read[0]) == 5 and read[0][0] == 0 and read[0][-1] == last


def test_of_a_mix_each_dataset_counts_by_its_weight(packed, tmp_path):
    """Against all samples of both, each with its share of the weight."""
    values = np.random.default_rng(1).normal([10.0, -4.0, 1.0], [3.0, 0.1, 1.0], (24, 16, 3))
    values += np.random.default_rng(2).normal(size=(24, 1, 3))
    levels = [{"p4": one.astype(np.float16), "p1": one.mean(0)[None]} for one in values]
    pack_discs(tmp_path / "data", levels, val_fraction=0.5)
    sets = packed, open_dataset(tmp_path / "data")
    mix = MixedDataset(sets, [Fraction(9, 10), Fraction(1, 10)])
    features, weights = [], []
    for data, share in zip(sets, (0.9, 0.1), strict=True):
        num = data.num_samples("train")
        batch = data.read(range(num), levels=["p4"])
        features.append(batch["pyramid"][4].double().mean(1).numpy())
        weights.append(np.full(num, share / num))
    values, weight = np.concatenate(features), np.concatenate(weights)
    mean = weight @ values
    deviation = np.sqrt(weight @ (values - mean) ** 2)
    made, R = of(level="p4", channels=3), RepresentationMLP(3, 4, 1)
    made.begin(R, mix, "train", "stop")
    np.testing.assert_allclose(R.mean.numpy(), mean, rtol=1e-3)
    np.testing.assert_allclose(R.std.numpy(), deviation, rtol=2e-3)


def test_of_one_dataset_it_is_the_plain_deviation_to_the_bit(packed):
    made, R = of(level="p4", channels=3), RepresentationMLP(3, 4, 1)
    made.begin(R, packed, "train", "stop")
    batch = packed.read(range(packed.num_samples("train")), levels=["p4"])
    plain = batch["pyramid"][4].float().mean(1).double().std(0, unbiased=False).float()
    assert torch.equal(R.std[:2], plain[:2])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"level": "p8", "channels": 3}, r"level: .*no level p8.*grids=\[8\], or take the mean"),
        ({"level": "pixels.n8"}, "guides: pixels"),
        ({"level": "p4", "channels": 384}, "channels: 384, but level p4 of .* has 3: set it to 3"),
    ],
)
def test_what_does_not_fit_the_shards_is_refused(packed, options, words):
    with pytest.raises(ConfigError, match=words):
        of(**options).check_data(packed)


def test_clip_that_is_not_there_and_a_level_that_does_not_vary_are_refused(tmp_path):
    pack_discs(tmp_path / "data", [{"p1": np.ones((1, 3), np.float16)}] * 24)
    data = open_dataset(tmp_path / "data")
    R = RepresentationMLP(3, 4, 1)
    with pytest.raises(ConfigError, match="name a clip: and prepare the photos again"):
        of(level="clip", channels=3).check_data(data)
    with pytest.raises(ConfigError, match="p1 is the same in all samples"):
        of(level="p1", channels=3).begin(R, data, "train", "stop")


def test_a_level_of_the_guide_and_grid_of_another_is_refused():
    made = of(level="flipped.p4")
    made.check_beside(["p4", "n4", "flipped.p4", "flipped.n8"])
    of(level="clip").check_beside(["p1"])
    with pytest.raises(ConfigError, match=r"flipped\.n4 and flipped\.p4 are of the same guide"):
        made.check_beside(["n4", "flipped.n4"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"level": "text"}, "level text is of captions"),
        ({"level": "latents.n4"}, "latents.n4 holds latents of an autoencoder.* use features"),
        ({"level": "latents_flipped.n4"}, "holds latents of an autoencoder"),
        ({"level": "q4"}, "is not the name of a level"),
        ({"dropout": 1.0}, "dropout"),
        ({"width": 7}, "width"),
    ],
)
def test_wrong_options_are_refused(options, words):
    with pytest.raises(ValidationError, match=words):
        RepresentationOptions(**options)
