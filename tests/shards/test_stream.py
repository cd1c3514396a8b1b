"""Streams: batches equal to what was packed, in one order for any ranks, threads and start."""

from __future__ import annotations

import gc
import io
import itertools
import logging
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from shards import CorruptSample, Sample, open_dataset
from shards.errors import ManifestError

from .conftest import CHANNELS


def expected_image(sample: Sample, size: int) -> np.ndarray:
    image = Image.open(io.BytesIO(sample.image)).convert("RGB")
    pixels = np.asarray(image.resize((size, size), Image.Resampling.BOX), np.float64)
    return ((pixels - 127.5) / 127.5).astype(np.float32).transpose(2, 0, 1)


@pytest.mark.parametrize("num_threads", [0, 1, 2])
@pytest.mark.parametrize("size", [32, 16, 4])
def test_batches_hold_what_was_packed(packed, samples, num_threads, size):
    by_key = {sample.key: sample for sample in samples}
    data = open_dataset(packed)
    with data.stream(
        10, seed=3, image_size=size, levels=(4, 8, 16), num_threads=num_threads
    ) as stream:
        for batch in itertools.islice(stream, 11):
            assert batch["image"].shape == (10, 3, size, size)
            assert batch["image"].dtype == torch.float32
            assert batch["image"].is_contiguous()
            assert {g: (p.shape, p.dtype) for g, p in batch["pyramid"].items()} == {
                g: ((10, g * g, CHANNELS), torch.float16) for g in (4, 8, 16)
            }
            for row, key in enumerate(batch["key"]):
                sample = by_key[key]
                np.testing.assert_array_equal(batch["image"][row], expected_image(sample, size))
                for grid, values in batch["pyramid"].items():
                    np.testing.assert_array_equal(values[row], sample.levels[f"p{grid}"])
                assert batch["label"][row] == sample.label


@pytest.mark.parametrize("num_threads", [0, 1])
@pytest.mark.parametrize("size", [32, 8])
def test_bytes_give_the_float_images_bit_for_bit(packed, num_threads, size):
    data = open_dataset(packed)
    asked = {"seed": 3, "image_size": size, "num_threads": num_threads}
    with data.stream(10, **asked) as floats, data.stream(10, **asked, image_dtype="uint8") as raw:
        for wanted, batch in itertools.islice(zip(floats, raw, strict=True), 6):
            assert batch["key"] == wanted["key"]
            assert batch["image"].dtype == torch.uint8
            assert batch["image"].shape == wanted["image"].shape
            assert batch["image"].is_contiguous()
            made = batch["image"].to(torch.float32).sub_(127.5).div_(127.5)
            assert torch.equal(made, wanted["image"])


def test_read_gives_samples_by_number(packed, samples):
    data = open_dataset(packed)
    keys = data.keys("val")
    numbers = [3, 0, 3]
    batch = data.read(numbers, split="val", levels=("p8",), image_size=8)
    assert batch["key"] == [keys[n] for n in numbers]
    assert batch["position"].tolist() == numbers
    by_key = {sample.key: sample for sample in samples}
    for row, key in enumerate(batch["key"]):
        np.testing.assert_array_equal(batch["pyramid"][8][row], by_key[key].levels["p8"])
        assert data.sample(numbers[row], "val").meta == by_key[key].meta
    for wrong in ([-1], [len(keys)], []):
        with pytest.raises(IndexError, match=f"val has samples 0 to {len(keys) - 1}"):
            data.read(wrong, split="val")


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    world_size=st.sampled_from([1, 2, 3, 4, 8]),
    num_threads=st.integers(0, 3),
    extra=st.integers(0, 20),
    num_before=st.integers(0, 5),
    num_lanes=st.sampled_from([1, 5, 64]),
    seed=st.integers(0, 3),
)
def test_one_order_for_any_ranks_threads_and_resume(
    packed, world_size, num_threads, extra, num_before, num_lanes, seed
):
    data = open_dataset(packed)
    n = data.num_samples("train")
    batch_size = world_size + extra
    # Resuming may change the size of the batch: position is all that counts.
    start = num_before * 7
    options = {"seed": seed, "num_lanes": num_lanes, "split": "train"}

    order = {}
    with data.stream(1, num_threads=0, **options) as alone:
        for position, batch in zip(range(start + 2 * n + 40), alone, strict=False):
            assert batch["position"].tolist() == [position]
            order[position] = batch["key"][0]
    keys = sorted(data.keys("train"))
    assert sorted(order[p] for p in range(n)) == keys
    assert sorted(order[p] for p in range(n, 2 * n)) == keys

    streams = [
        data.stream(
            batch_size, rank=rank, world_size=world_size, start=start, num_threads=num_threads,
            **options,
        )
        for rank in range(world_size)
    ]  # fmt: skip
    shown: dict[int, str] = {}
    position = start
    while position < start + 2 * n:
        together = []
        for stream in streams:
            assert stream.state_dict() == {"position": position}
            batch = next(stream)
            together += zip(batch["position"].tolist(), batch["key"], strict=True)
        # The whole batch is these positions and no others, each shown by one rank alone.
        assert sorted(p for p, _ in together) == list(range(position, position + batch_size))
        shown.update(together)
        position += batch_size
    for stream in streams:
        stream.close()
    assert all(order[p] == key for p, key in shown.items() if p in order)
    epoch = range(-(-start // n) * n, -(-start // n) * n + n)
    assert sorted(shown[p] for p in epoch) == keys


def test_ranks_together_give_the_batch_of_one_rank(packed):
    data = open_dataset(packed)
    whole = next(data.stream(16, levels=(4,), num_threads=0))
    for world_size in (2, 3, 8):
        parts = [
            next(data.stream(16, levels=(4,), rank=r, world_size=world_size, num_threads=0))
            for r in range(world_size)
        ]
        assert [key for part in parts for key in part["key"]] == whole["key"]
        assert torch.equal(torch.cat([p["pyramid"][4] for p in parts]), whole["pyramid"][4])


def test_state_is_that_of_the_batch_in_hand(packed):
    data = open_dataset(packed)
    with data.stream(8, seed=1, num_threads=2) as stream:
        seen = [next(stream)["key"] for _ in range(3)]
        state = stream.state_dict()
        assert state == {"position": 24}
        following = [next(stream)["key"] for _ in range(3)]
    assert seen[-1] != following[0]
    with data.stream(8, seed=1, start=state["position"], num_threads=0) as resumed:
        assert [next(resumed)["key"] for _ in range(3)] == following


def test_a_batch_belongs_to_its_holder(packed):
    """Buffers are used again, but never under a tensor that somebody still holds."""
    data = open_dataset(packed)
    with data.stream(4, levels=(16,), image_size=32, num_threads=1) as stream:
        kept = []
        for batch in itertools.islice(stream, 30):
            view = batch["pyramid"][16][1:2]
            kept.append((view, view.clone(), batch["image"].clone(), batch["image"]))
            del batch, view
        for view, features, pixels, image in kept:
            assert torch.equal(view, features)
            assert torch.equal(image, pixels)
        kept.clear()
        del view, features, pixels, image
        pointers = {next(stream)["pyramid"][16].data_ptr() for _ in range(30)}
        assert len(pointers) <= 8


def test_threads_end_with_the_stream(packed):
    def readers():
        return [t for t in threading.enumerate() if t.name.startswith("shards")]

    data = open_dataset(packed)
    stream = data.stream(8, levels=(4,), num_threads=2)
    next(stream)
    assert readers()
    stream.close()
    assert not readers()
    with pytest.raises(ValueError, match="closed"):
        next(stream)
    stream = data.stream(8, levels=(4,), num_threads=2)
    next(stream)
    threads = readers()
    del stream
    gc.collect()
    for thread in threads:
        thread.join(5)
    assert not readers()


@pytest.mark.parametrize("num_threads", [0, 2])
def test_stop_names_shard_and_sample(copy, flip, num_threads):
    key = damage(copy, flip, "p4.npy", 5)
    data = open_dataset(copy)
    with (
        pytest.raises(CorruptSample, match=rf"train-00001\.tar: {key}\.p4\.npy: .*checksum"),
        data.stream(8, levels=("p4",), num_threads=num_threads) as stream,
    ):
        for _ in range(20):
            next(stream)
    assert not [t for t in threading.enumerate() if t.name.startswith("shards")]
    # What is not read is not missed.
    with data.stream(8, levels=("p8",), num_threads=num_threads) as stream:
        for _ in range(20):
            next(stream)


def damage(folder: Path, flip, suffix: str, row: int, shard: str = "train-00001") -> str:
    """Flip a bit in the middle of a member; returns the sample's key."""
    from shards.format.index import load

    index = load(folder / f"{shard}.index.npz")
    number = index.column(suffix)
    if index.offsets[row, number] < 0:
        number = index.column("png")
    middle = int(index.offsets[row, number] + index.sizes[row, number] // 2)
    flip(folder / f"{shard}.tar", middle)
    return index.key(row)


@pytest.mark.parametrize(
    "suffix, wanted", [("p16.npy", {"levels": (16,)}), ("jpg", {"image_size": 8})]
)
def test_skipping_is_alike_on_every_rank(copy, flip, caplog, suffix, wanted):
    bad = {damage(copy, flip, suffix, row) for row in (1, 2, 6)}
    data = open_dataset(copy)
    n = data.num_samples("train")
    runs = {}
    for world_size, num_threads in ((1, 0), (2, 2), (3, 1), (8, 0)):
        streams = [
            data.stream(
                12, seed=5, rank=r, world_size=world_size, on_error="skip",
                num_threads=num_threads, **wanted,
            )
            for r in range(world_size)
        ]  # fmt: skip
        shown = {}
        with caplog.at_level(logging.ERROR):
            for _ in range(2 * n // 12 + 1):
                for stream in streams:
                    batch = next(stream)
                    shown.update(zip(batch["position"].tolist(), batch["key"], strict=True))
        runs[world_size] = (shown, sum(stream.num_skipped for stream in streams))
        for stream in streams:
            stream.close()
    shown, num_skipped = runs[1]
    assert all(run == (shown, num_skipped) for run in runs.values())
    assert not bad & set(shown.values())
    clean = next(open_dataset(copy).stream(len(shown), seed=5, num_threads=0))
    without = dict(zip(clean["position"].tolist(), clean["key"], strict=True))
    replaced = {p for p in shown if shown[p] != without[p]}
    assert {without[p] for p in replaced} == bad
    assert num_skipped == len(replaced)
    # Each rank of each of the four runs says it once per sample, not once per epoch.
    said = [r.getMessage() for r in caplog.records if "SKIPPED" in r.getMessage()]
    assert all(any(key in line for line in said) for key in bad)
    assert len(said) <= len(bad) * (1 + 2 + 3 + 8)


def test_a_missing_shard_and_a_cut_off_tar_are_named_or_skipped(copy):
    (copy / "train-00002.tar").unlink()
    tar = copy / "train-00003.tar"
    tar.write_bytes(tar.read_bytes()[: tar.stat().st_size // 2])
    data = open_dataset(copy)
    lost = set(open_dataset(copy).keys("train")[16:24])
    with pytest.raises(CorruptSample, match=r"train-00002\.tar: .*its shard is missing"):
        data.read(range(16, 17), levels=(4,))
    with pytest.raises(CorruptSample, match=r"train-00003\.tar: .*cut off"):
        data.read(range(24, 32), levels=(4,))
    n = data.num_samples("train")
    with data.stream(n, levels=(4,), on_error="skip", num_threads=1) as stream:
        batch = next(stream)
    assert not lost & set(batch["key"])
    assert stream.num_skipped > len(lost)


def test_a_shard_lost_in_the_middle_of_a_run_is_named(copy, monkeypatch):
    monkeypatch.setattr("shards.read.dataset.Folder.num_open", 1)
    data = open_dataset(copy)
    data.read([0], levels=(4,))
    data.read([16], levels=(4,))  # which closes the first tar
    (copy / "train-00000.tar").unlink()
    with pytest.raises(CorruptSample, match=r"train-00000\.tar: .*its shard is missing"):
        data.read([0, 16], levels=(4,))


def test_when_nothing_is_left_it_says_so(copy):
    for tar in copy.glob("val-*.tar"):
        tar.unlink()
    with pytest.raises(CorruptSample, match="missing"):
        next(open_dataset(copy).stream(4, split="val", levels=(4,), on_error="skip", num_threads=0))


def test_wrong_questions_get_clear_answers(packed):
    data = open_dataset(packed)
    with pytest.raises(ManifestError, match="no split 'dev'; its splits are train, val, test"):
        data.stream(4, split="dev")
    with pytest.raises(ManifestError, match="no level n4; its levels are: p16, p4, p8"):
        data.stream(4, levels=("n4",))
    with pytest.raises(ValueError, match="one level per grid"):
        data.manifest.levels["n4"] = data.manifest.levels["p4"]
        data.stream(4, levels=("p4", "n4"))
    with pytest.raises(ValueError, match="image_size 64 is not between 1 and the stored 32"):
        data.stream(4, image_size=64)
    with pytest.raises(ValueError, match="at least the number of ranks, 8"):
        data.stream(4, world_size=8)
    with pytest.raises(ValueError, match="rank 2 is not one of 2"):
        data.stream(4, rank=2, world_size=2)
    with pytest.raises(ValueError, match="image_dtype must be 'float32' or 'uint8', not 'int8'"):
        data.stream(4, image_dtype="int8")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="pin_memory needs a GPU"):
            data.stream(4, pin_memory=True)


def test_a_reader_holds_rows_of_the_shards_it_has_read(packed, samples):
    data = open_dataset(packed)
    table = data.table("train")
    assert len(table.shards) > 2
    last = data.num_samples() - 1
    for number in (last, 0, last, 1):
        batch = data.read([number], levels=(4,), image_size=32)
        (wanted,) = (sample for sample in samples if sample.key == batch["key"][0])
        np.testing.assert_array_equal(batch["pyramid"][4][0], wanted.levels["p4"])
        np.testing.assert_array_equal(batch["image"][0], expected_image(wanted, 32))
    sizes = [shard.num_samples for shard in table.shards]
    column = table.column("p4.npy", {0, len(sizes) - 1})
    assert len(column.offsets) <= 2 * (sizes[0] + sizes[-1]) < data.num_samples()
    data.read(range(last + 1), levels=(4,))
    assert len(table.column("p4.npy", set(range(len(sizes)))).offsets) == data.num_samples()
