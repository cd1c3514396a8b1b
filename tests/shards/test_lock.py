"""Locks: held, held by somebody else, or not known to the file system."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from shards import files as module
from shards.errors import PackError
from shards.files import NO_LOCKS, Locked, is_locked, lock
from shards.remote.storage import Cache, lock_of
from shards.write.shard_writer import ShardWriter

# flock as file systems without locks answer it.
NO_FLOCK = (
    "#include <errno.h>\nint flock(int a, int b) { (void)a; (void)b; errno = ENOSYS; return -1; }\n"
)


@pytest.fixture
def no_locks(monkeypatch):
    """A file system without locks; its first warning is still to come."""

    def answer(number):
        def flock(file, flags):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(fcntl, "flock", flock)
        monkeypatch.setattr(module, "_WARNED", set())

    answer(errno.ENOLCK)
    return answer


def exclusive(file, path):
    return lock(file, path, shared=False, wait=False)


def test_one_holds_it_alone_or_many_share_it(tmp_path):
    path = tmp_path / "x.lock"
    with path.open("w") as first, path.open("w") as second, path.open("rb") as third:
        assert exclusive(first, path) is Locked.HELD
        assert exclusive(second, path) is Locked.BUSY
        assert is_locked(path)
        first.close()
        assert lock(second, path, shared=True, wait=False) is Locked.HELD
        assert lock(third.fileno(), path, shared=True, wait=True) is Locked.HELD
        assert not is_locked(path)
        with path.open("w") as fourth:
            assert exclusive(fourth, path) is Locked.BUSY
    assert not is_locked(path) and not is_locked(tmp_path / "none")
    assert not is_locked(path / ".lock")  # a file where its folder should be


@pytest.mark.parametrize("number", sorted(NO_LOCKS))
def test_without_locks_work_goes_on_with_one_warning(tmp_path, no_locks, caplog, number):
    no_locks(number)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        with (tmp_path / name / ".lock").open("w") as file:
            assert exclusive(file, tmp_path / name / ".lock") is Locked.UNKNOWN
    assert not is_locked(tmp_path / "a" / ".lock")
    (record,) = caplog.records
    assert "HAS NO FILE LOCKS" in record.message and str(tmp_path / "a") in record.message


def test_another_fault_is_no_lack_of_locks(tmp_path, no_locks):
    no_locks(errno.EIO)
    with (tmp_path / "x").open("w") as file, pytest.raises(OSError, match="Input/output"):
        exclusive(file, tmp_path / "x")


def test_packing_says_another_process_only_where_there_is_one(tmp_path, no_locks, caplog):
    with ShardWriter(tmp_path / "a"):
        pass
    assert "HAS NO FILE LOCKS" in caplog.text


def test_packing_names_another_process(tmp_path):
    with ShardWriter(tmp_path / "a"), pytest.raises(PackError, match="another process is packing"):
        ShardWriter(tmp_path / "a")


def test_a_cache_without_locks_keeps_to_its_limit(tmp_path, no_locks):
    cache = Cache(tmp_path, limit=300)
    folder = tmp_path / ("0" * 20)
    folder.mkdir()
    for number, name in enumerate(("old.tar", "new.tar")):
        (folder / name).write_bytes(bytes(100))
        lock_of(folder / name).touch()
        os.utime(folder / name, (number, number))
    with cache.fetching(folder / "more.tar") as file, cache.user():
        part = cache.part_of(folder / "more.tar")
        assert str(os.getpid()) in part.name  # another process has another one
        assert cache.reserve(file, 150, urgent=False)
        assert not (folder / "old.tar").exists() and (folder / "new.tar").exists()
        assert cache.share() == (150.0, 1)  # its own file was not taken for a dead process's


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")
def test_a_process_whose_flock_fails_packs(tmp_path):
    """The real call, replaced beneath Python."""
    (tmp_path / "no_flock.c").write_text(NO_FLOCK)
    library = tmp_path / "no_flock.so"
    build = ["gcc", "-shared", "-fPIC", "-o", str(library), str(tmp_path / "no_flock.c")]
    subprocess.run(build, check=True)
    script = "import pathlib, shards; shards.ShardWriter(pathlib.Path('out')).close()"
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=os.environ | {"LD_PRELOAD": str(library), "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and "HAS NO FILE LOCKS" in done.stderr, done.stderr
