"""A file that cannot be written leaves nothing behind, in packing and in repairing."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from shards import ShardWriter
from shards.check.repair import repair
from shards.files import atomic_write

from .conftest import make_samples


def full_disk(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_what_is_still_in_the_buffer_does_not_keep_the_temporary_file(tmp_path: Path):
    with pytest.raises(OSError, match="No space left"), atomic_write(tmp_path / "x") as file:
        file.write(b"fits into the buffer")
        full = os.open("/dev/full", os.O_WRONLY)
        os.dup2(full, file._file.fileno())
        os.close(full)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("shard_size", [4, 100])
def test_a_shard_that_cannot_be_finished_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shard_size: int
):
    with (
        pytest.raises(OSError, match="No space left"),
        ShardWriter(tmp_path, shard_size=shard_size) as writer,
    ):
        monkeypatch.setattr(os, "fsync", full_disk)
        for sample in make_samples(6):
            writer.add(sample)
        writer.finish()
    assert not list(tmp_path.glob("*.tar"))
    assert not list(tmp_path.glob(".*.tmp"))


def test_a_repair_without_room_leaves_the_shard_as_it_was(
    copy: Path, monkeypatch: pytest.MonkeyPatch
):
    tar = copy / "train-00001.tar"
    cut = tar.read_bytes()[: tar.stat().st_size // 2]
    tar.write_bytes(cut)
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        repair(copy, allow_loss=True)
    assert tar.read_bytes() == cut
    assert not list(copy.glob(".*.tmp"))
