"""What a mix of datasets shows, on any ranks and from anywhere; what its datasets have to share."""

from __future__ import annotations

import itertools
import shutil
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shards import CorruptSample, open_dataset, pack
from shards.errors import ManifestError
from shards.read.mixture import MixedDataset
from shards.read.order import seed_of

from .conftest import SIZE, jpeg, make_samples
from .test_mix_order import walk
from .test_stream import damage, expected_image


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """Other samples than those of `packed`, some under the same keys, of another size."""
    found = [
        type(sample)(
            key=sample.key if i % 2 else f"raw-{i}",
            image=jpeg(900 + i, SIZE * 2),
            image_format="jpg",
            levels={name: values + 1 for name, values in sample.levels.items() if name != "p16"},
            label=4 - sample.label,
        )
        for i, sample in enumerate(make_samples(37))
    ]
    folder = tmp_path_factory.mktemp("others") / "data"
    guide = {"name": "noise", "random": True}
    pack(found, folder, shard_size=5, val_fraction=0.2, guide=guide)
    return folder, found


def mixed(packed, others, *weights):
    sets = [open_dataset(packed), open_dataset(others[0])]
    return MixedDataset(sets, [Fraction(text) for text in weights or ("0.7", "0.3")])


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    world_size=st.sampled_from([1, 2, 3, 5]),
    num_threads=st.integers(0, 2),
    extra=st.integers(0, 11),
    start=st.integers(0, 200),
    seed=st.integers(0, 3),
    text=st.sampled_from(["0.7", "0.5", "0.333", "0.01"]),
)
def test_one_mix_for_any_ranks_threads_and_resume(
    packed, others, world_size, num_threads, extra, start, seed, text
):
    weight = Fraction(text)
    data = mixed(packed, others, weight, 1 - weight)
    batch_size, num_batches = world_size + extra, 4
    owners = walk([weight, 1 - weight], start + batch_size * num_batches)[start:]
    # each dataset alone, in the order that it has in the mix
    wanted = {}
    for number, one in enumerate(data.sets):
        with one.stream(1, seed_of(seed, number, 2), num_threads=0, num_lanes=8) as alone:
            wanted[number] = [
                batch["key"][0] for batch in itertools.islice(alone, len(owners) + start)
            ]
    streams = [
        data.stream(
            batch_size, seed, rank, world_size, start, image_size=16, levels=("p4",),
            num_threads=num_threads, num_lanes=8,
        )
        for rank in range(world_size)
    ]  # fmt: skip
    by_key = [{s.key: s for s in make_samples(png_every=7)}, {s.key: s for s in others[1]}]
    for k in range(num_batches):
        shown = []
        for stream in streams:
            assert stream.state_dict() == {"position": start + k * batch_size}
            batch = next(stream)
            shown += batch["position"].tolist()
            for row, position in enumerate(batch["position"].tolist()):
                number, own = owners[position - start]
                assert batch["key"][row] == wanted[number][own]
                sample = by_key[number][batch["key"][row]]
                np.testing.assert_array_equal(batch["pyramid"][4][row], sample.levels["p4"])
                np.testing.assert_array_equal(batch["image"][row], expected_image(sample, 16))
                assert batch["label"][row] == sample.label
        begin = start + k * batch_size
        assert sorted(shown) == list(range(begin, begin + batch_size))
    for stream in streams:
        stream.close()


def test_a_damaged_sample_is_replaced_by_one_of_its_own_dataset(packed, others, flip, tmp_path):
    bad = shutil.copytree(others[0], tmp_path / "bad")
    key = damage(bad, flip, "p4.npy", 2)
    data = mixed(packed, (bad, None), "0.5", "0.5")
    with (
        pytest.raises(CorruptSample, match=rf"bad/train-00001\.tar: {key}\.p4\.npy"),
        data.stream(10, levels=("p4",), num_threads=0) as stream,
    ):
        for _ in range(20):
            next(stream)
    shown = []
    for folder in (others[0], bad):
        data = mixed(packed, (folder, None), "0.5", "0.5")
        with data.stream(10, levels=("p4",), on_error="skip", num_threads=1) as stream:
            keys = {}
            for batch in itertools.islice(stream, 8):
                keys |= dict(zip(batch["position"].tolist(), batch["key"], strict=True))
            shown.append((keys, stream.num_skipped))
    (sound, none), (replaced, some) = shown
    changed = {p for p in sound if sound[p] != replaced[p]}
    assert none == 0 and some == len(changed) > 0
    assert {sound[p] for p in changed} == {key}
    owner = walk([Fraction(1, 2)] * 2, 80)
    assert {owner[p][0] for p in changed} == {1}
    with pytest.raises(CorruptSample, match=r"bad/train-00001\.tar"):
        data.read(range(data.num_samples()), levels=("p4",))
    keys = data.keys()
    (lost,) = (n for n in range(data.sets[0].num_samples(), len(keys)) if keys[n] == key)
    batch = data.read(range(len(keys)), levels=("p4",), on_error="skip")
    assert batch["key"] == [*keys[:lost], keys[lost + 1], *keys[lost + 1 :]]


def test_behind_urls_it_shows_the_same(packed, others, tmp_path):
    local = mixed(packed, others)
    cache = tmp_path / "cache"
    sets = [open_dataset(f"file://{folder}", cache) for folder in (packed, others[0])]
    far = MixedDataset(sets, [Fraction(7), Fraction(3)])
    options = {"seed": 2, "start": 30, "image_size": 8, "num_threads": 1}
    with far.stream(6, **options) as there, local.stream(6, **options) as here:
        for a, b in itertools.islice(zip(there, here, strict=True), 40):
            assert a["key"] == b["key"]
            np.testing.assert_array_equal(a["image"], b["image"])


def test_what_a_mix_says_of_itself(packed, others):
    data = mixed(packed, others)
    first, second = data.sets
    assert data.weights == (Fraction(7, 10), Fraction(3, 10))
    assert data.location == f"0.7 of {packed} + 0.3 of {others[0]}"
    for split in ("train", "val", "test", "dev"):
        assert data.num_samples(split) == first.num_samples(split) + second.num_samples(split)
    assert data.manifest.image_size == SIZE
    assert data.manifest.has_labels
    assert sorted(data.manifest.levels) == ["p4", "p8"]
    assert data.manifest.guide == first.manifest.guide
    with data.stream(4, num_threads=0) as stream:
        assert stream.num_samples == data.num_samples("train")
    with pytest.raises(ManifestError, match=r"has no split 'test'; its splits are train, val"):
        data.stream(4, split="test")
    with pytest.raises(ManifestError, match="has no level p16; its levels are: p4, p8"):
        data.stream(4, levels=("p16",))
    with pytest.raises(ValueError, match="image_size 64 is not between 1 and the stored 32"):
        data.stream(4, image_size=64)


def test_samples_by_number_are_those_of_one_dataset_after_the_other(packed, others):
    data = mixed(packed, others)
    first = data.sets[0]
    for split in ("train", "val", "test"):
        keys = [key for one in data.sets if one.num_samples(split) for key in one.keys(split)]
        assert data.keys(split) == keys
        numbers = [len(keys) - 1, 0, first.num_samples(split) - 1]
        batch = data.read(numbers, split=split, levels=("p8",), image_size=8)
        assert batch["key"] == [keys[number] for number in numbers]
        assert batch["position"].tolist() == numbers
        for row, number in enumerate(numbers):
            sample = data.sample(number, split)
            assert sample.key == keys[number]
            np.testing.assert_array_equal(batch["pyramid"][8][row], sample.levels["p8"])
        with pytest.raises(IndexError, match=f"{split} has samples 0 to {len(keys) - 1}"):
            data.read([len(keys)], split=split)
        with pytest.raises(IndexError, match=f"{split} has samples 0 to {len(keys) - 1}"):
            data.sample(len(keys), split)
    with pytest.raises(ManifestError, match="no split 'dev'"):
        data.read([0], split="dev")


def test_the_variance_is_that_of_the_mix(packed, others):
    data = mixed(packed, others, "1", "3")
    values, weights = [], []
    for one, weight in zip(data.sets, (0.25, 0.75), strict=True):
        n = one.num_samples("train")
        values += [one.sample(i).levels["p4"].astype(np.float64) for i in range(n)]
        weights += [weight / n] * n
    mean = np.average(values, axis=0, weights=weights)
    variance = np.average((np.array(values) - mean) ** 2, axis=0, weights=weights)
    np.testing.assert_allclose(data.level_mean("p4"), mean, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(data.level_variance("p4"), variance, rtol=1e-4)
    assert data.total_variance(4) == pytest.approx(variance.mean(), rel=1e-4)


def test_datasets_that_contradict_each_other_are_named(packed, others, tmp_path):
    def other(name, **changes):
        samples = [
            type(s)(s.key, s.image, s.image_format, levels=changes.get("levels", s.levels),
                    label=s.label if changes.get("labels", True) else None)
            for s in make_samples(4)
        ]  # fmt: skip
        guide = {"name": "noise", "random": True} | changes.get("guide", {})
        pack(samples, tmp_path / name, guide=guide)
        return tmp_path / name, None

    guide = other("guide", guide={"weights_sha256": "abc", "path": "my/guide"})
    with pytest.raises(ManifestError, match=r"guide: its guide \(my/guide\) differs from"):
        mixed(packed, guide)
    wide = other("wide", levels={"p4": np.zeros((16, 3))})
    with pytest.raises(ManifestError, match=r"its level p4 has 3 channels .* 6 of float16"):
        mixed(packed, wide)
    plain = mixed(packed, other("plain", labels=False))
    assert not plain.manifest.has_labels
    assert "label" not in next(plain.stream(4, num_threads=0))
    with pytest.raises(ValueError, match="two or more datasets"):
        MixedDataset([open_dataset(packed)], [Fraction(1)])
