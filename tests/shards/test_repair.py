"""What is damaged is repaired as far as it can be, and plain tars become a dataset."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from shards import Sample, open_dataset
from shards.check.repair import rebuild_indexes, repair
from shards.check.verify import verify
from shards.errors import IndexFileError, ManifestError
from shards.files import sha256_file

from .conftest import files_of
from .damaged import Flip, change_manifest, place, problems_of
from .test_index import write_plain


def damage_cut(folder: Path, flip: Flip) -> int:
    tar = folder / "train-00001.tar"
    _, offset, _ = place(folder, "train-00001", 5, "p16.npy")
    tar.write_bytes(tar.read_bytes()[: offset + 10])
    return 3


def damage_cut_without_index(folder: Path, flip: Flip) -> int:
    lost = damage_cut(folder, flip)
    (folder / "train-00001.index.npz").unlink()
    return lost


def damage_flips(folder: Path, flip: Flip) -> int:
    for row, suffix in ((0, "p4.npy"), (7, "json")):
        _, offset, _ = place(folder, "train-00002", row, suffix)
        flip(folder / "train-00002.tar", offset + 1)
    return 2


def damage_header(folder: Path, flip: Flip) -> int:
    _, offset, _ = place(folder, "train-00002", 2, "p8.npy")
    flip(folder / "train-00002.tar", offset - 128 - 512 + 130)
    # The index still knows where everything is.
    return 0


def damage_missing(folder: Path, flip: Flip) -> int:
    (folder / "train-00003.tar").unlink()
    return 8


def damage_checksum(folder: Path, flip: Flip) -> int:
    change_manifest(folder, lambda m: m["shards"][0].update(sha256="0" * 64))
    return 0


@pytest.mark.parametrize(
    "damage",
    [
        damage_cut, damage_cut_without_index, damage_flips, damage_header, damage_missing,
        damage_checksum,
    ],
)  # fmt: skip
def test_repair_keeps_all_that_is_sound(
    copy: Path, samples: list[Sample], flip: Flip, damage: Callable[[Path, Flip], int]
):
    before = open_dataset(copy).keys()
    num_lost = damage(copy, flip)
    assert problems_of(copy)
    done = repair(copy, allow_loss=True)
    assert done
    assert problems_of(copy) == []
    data = open_dataset(copy)
    keys = data.keys()
    assert len(keys) == len(before) - num_lost
    assert keys == [key for key in before if key in set(keys)]
    by_key = {sample.key: sample for sample in samples}
    for number, key in enumerate(keys):
        sample = data.sample(number)
        assert (sample.image, sample.meta) == (by_key[key].image, by_key[key].meta)
        for name, values in by_key[key].levels.items():
            np.testing.assert_array_equal(sample.levels[name], values)
    stack = np.stack([by_key[key].levels["p16"] for key in keys]).astype(np.float64)
    np.testing.assert_allclose(data.total_variance("p16"), stack.var(0).mean(), rtol=1e-12)
    assert repair(copy) == []


def test_repair_of_a_sound_dataset_changes_nothing(copy: Path):
    before = files_of(copy)
    assert repair(copy) == []
    assert files_of(copy) == before


def test_repair_gives_up_where_nothing_is_left(copy: Path):
    for tar in copy.glob("train-*.tar"):
        tar.unlink()
    with pytest.raises(ManifestError, match="no sample of the train split is left"):
        repair(copy, allow_loss=True)


def test_plain_tars_become_a_dataset(tmp_path: Path, samples: list[Sample]):
    write_plain(tmp_path / "train-0.tar", samples[:20])
    write_plain(tmp_path / "train-1.tar", samples[20:40])
    rebuild_indexes(tmp_path)
    data = open_dataset(tmp_path)
    assert verify(data) == []
    stack = np.stack([s.levels["p8"] for s in samples[:40]]).astype(np.float64)
    np.testing.assert_allclose(data.total_variance(8), stack.var(0).mean(), rtol=1e-12)
    assert data.manifest.shards[1].sha256 == sha256_file(tmp_path / "train-1.tar")


def test_a_cut_off_plain_tar_is_salvaged(tmp_path: Path, samples: list[Sample]):
    path = tmp_path / "a.tar"
    write_plain(path, samples[:10])
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    with pytest.raises(IndexFileError, match=r"a\.tar.*dinogen shards repair"):
        open_dataset(tmp_path)
    repair(tmp_path, allow_loss=True)
    data = open_dataset(tmp_path)
    keys = data.keys()
    assert 4 <= len(keys) < 10
    assert keys == [s.key for s in samples[: len(keys)]]
    assert verify(data) == []
