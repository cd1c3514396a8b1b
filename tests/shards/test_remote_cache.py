"""The cache of remote shards: its limit, who may be evicted, and what is prefetched."""

from __future__ import annotations

import fcntl
import itertools
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from shards import open_dataset, pack
from shards.read.order import Order
from shards.remote.storage import GB, Cache, HeldFile, lock_of, part_of
from tests.servers import Faulty, http_server

from .conftest import make_samples

ROOT = Path(__file__).parents[2]
NAMES = [f"train-{number:05d}.tar" for number in range(4)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A cache with the folder of one dataset: four tars of 1000 bytes, the first used last."""
    folder = tmp_path / "cache" / ("0123456789" * 2)
    folder.mkdir(parents=True)
    for age, name in enumerate(NAMES):
        path = folder / name
        path.write_bytes(bytes(1000))
        lock_of(path).touch()
        # Read a moment ago, as far as a file system with access times would tell.
        os.utime(path, (time.time(), 1e9 - age * 1000))
    return folder


def reserve(cache: Cache, folder: Path, num_bytes: int, urgent: bool = True) -> bool:
    with cache.fetching(folder / "new.tar") as lock:
        return cache.reserve(lock, num_bytes, urgent)


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.tar"))


def test_the_longest_unused_goes_first(folder):
    cache = Cache(folder.parent, 4000)
    assert reserve(cache, folder, 500)
    assert left(folder) == NAMES[:3]
    # A use is the end of a reading, regardless of the mount says about access times.
    del (file := HeldFile(folder / NAMES[2])).path, file
    assert reserve(cache, folder, 2500)
    assert left(folder) == [NAMES[2]]


def test_without_a_limit_nothing_goes(folder):
    assert reserve(Cache(folder.parent), folder, 10**12)
    assert left(folder) == NAMES


def test_what_is_held_stays_and_what_is_not_urgent_waits(folder, caplog):
    caplog.set_level(logging.WARNING, "shards")
    held = [HeldFile(folder / NAMES[3]), HeldFile(folder / NAMES[0])]
    cache = Cache(folder.parent, 3000)
    assert not reserve(cache, folder, 1500, urgent=False)
    assert left(folder) == [NAMES[0], NAMES[3]]
    assert caplog.messages == []
    assert reserve(cache, folder, 1500)
    (line,) = caplog.messages
    assert "data.cache_gb=3e-06 IS TOO SMALL" in line
    assert "needs 3.5e-06 GB at once" in line
    assert reserve(cache, folder, 1500)
    assert len(caplog.messages) == 1
    held.clear()
    assert reserve(cache, folder, 1500, urgent=False)


def test_another_process_holds_it_until_it_dies(folder):
    script = (
        "import sys; from pathlib import Path; from shards.remote.storage import HeldFile\n"
        "file = HeldFile(Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", script, str(folder / NAMES[3])]
    process = subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    cache = Cache(folder.parent, 1000)
    assert not reserve(cache, folder, 1000, urgent=False)
    assert left(folder) == [NAMES[3]]
    process.kill()
    process.communicate()
    assert reserve(cache, folder, 1000, urgent=False)
    assert left(folder) == []


def test_who_reads_an_evicted_file_reads_on(folder):
    plain = os.open(folder / NAMES[3], os.O_RDONLY)
    assert reserve(Cache(folder.parent, 1000), folder, 1000)
    assert left(folder) == []
    assert os.pread(plain, 2000, 0) == bytes(1000)
    os.close(plain)


def test_a_file_evicted_while_it_is_opened_is_not_taken(folder, monkeypatch):
    path = folder / NAMES[0]
    original = os.open

    def evicted_meanwhile(*args):
        descriptor = original(*args)
        path.unlink(missing_ok=True)
        return descriptor

    monkeypatch.setattr("shards.format.table.os.open", evicted_meanwhile)
    with pytest.raises(FileNotFoundError):
        HeldFile(path)


def test_fetches_under_way_take_room_unless_their_process_died(folder):
    cache = Cache(folder.parent, 6000)
    with cache.fetching(folder / "first.tar") as lock:
        assert cache.reserve(lock, 2000, urgent=False)
        assert reserve(cache, folder, 1000)
        assert left(folder) == NAMES[:3]
    # A process that was killed leaves the same behind, but for the lock.
    os.truncate(lock_of(folder / "first.tar"), 10**6)
    part_of(folder / "first.tar").write_bytes(bytes(100))
    assert reserve(cache, folder, 2000)
    assert left(folder) == NAMES[:3]
    assert not part_of(folder / "first.tar").exists()


def test_other_things_in_the_folder_are_left_alone(folder):
    strangers = [folder.parent / "mine" / "a.tar", folder.parent / "b.tar", folder / "c.tar"]
    for path in strangers:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(bytes(5000))
        os.utime(path, (1, 1))
    reserve(Cache(folder.parent, 1), folder, 1)
    assert all(path.exists() for path in strangers)
    assert left(folder) == ["c.tar"]


def test_users_share_the_limit(tmp_path):
    cache, other = Cache(tmp_path, 1000), Cache(tmp_path, 1000)
    with cache.user():
        assert cache.share() == (1000, 1)
        with other.user():
            assert cache.share() == other.share() == (500, 2)
        assert cache.share() == (1000, 1)
    # A killed one leaves its file without the lock.
    (tmp_path / ".user-dead").touch()
    with cache.user():
        assert cache.share() == (1000, 1)


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> Path:
    """A dataset of 60 shards of 4 samples, some 12 kB each."""
    folder = tmp_path_factory.mktemp("wide") / "data"
    pack(make_samples(240), folder, shard_size=4, guide={"name": "noise"})
    return folder


@pytest.fixture
def server(wide: Path) -> Iterator[Faulty]:
    with http_server(wide) as server:
        yield server


STREAM = {"levels": (4,), "num_lanes": 4, "window_shards": 2, "seed": 5}


def size_of(folder: Path) -> int:
    """Bytes of all that is not temporary; while it counts, nothing is evicted."""
    with (folder / ".lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        files = [path for path in folder.rglob("*") if path.name[0] != "." and path.is_file()]
        return sum(path.stat().st_size for path in files)


def tars(names: list[str]) -> list[str]:
    return [name for name in names if name.endswith(".tar")]


def test_shards_are_there_before_they_are_needed(wide, server, tmp_path):
    data = open_dataset(server.url, cache_dir=tmp_path)
    order = Order([4] * 60, 5, 4, 2)
    with data.stream(8, num_threads=0, **STREAM) as stream:
        next(stream)
        # All of what comes within a window, and no more than that.
        places = order.places(0, 8 + order.window_span + 64)
        soon = set(places.shard[: order.window_span].tolist())
        late = set(places.shard.tolist())
        until = time.monotonic() + 120
        names = {f"train-{shard:05d}.tar" for shard in soon}
        while not names <= {path.name for path in tmp_path.rglob("*.tar")}:
            assert time.monotonic() < until
            time.sleep(0.02)
        time.sleep(0.3)
        asked = set(tars(server.requests))
        assert names <= asked <= {f"train-{shard:05d}.tar" for shard in late}
        assert len(asked) < 40
        server.fault = lambda name, before: 404
        for _ in range(order.window_span // 8 - 1):
            next(stream)


def test_a_cache_of_half_the_dataset_keeps_its_limit(wide, server, tmp_path, caplog):
    """Two epochs and a bit, in a cache that holds a window twice, but never all."""
    tars_size = sum(path.stat().st_size for path in wide.glob("*.tar"))
    small_size = size_of(wide) - tars_size
    limit = tars_size // 2 + small_size
    local, most = open_dataset(wide), 0
    data = open_dataset(server.url, cache_dir=tmp_path, cache_gb=limit / GB)
    with local.stream(8, **STREAM) as plain, data.stream(8, **STREAM) as stream:
        for a, b in itertools.islice(zip(plain, stream, strict=False), 70):
            assert a["key"] == b["key"]
            assert torch.equal(a["pyramid"][4], b["pyramid"][4])
            most = max(most, size_of(tmp_path))
    assert limit / 2 < most <= limit
    assert "IS TOO SMALL" not in caplog.text
    fetched = tars(server.requests)
    # Each is fetched once an epoch, not each time it is looked at.
    assert 60 < len(fetched) <= 60 * 3


def test_a_limit_below_what_is_needed_at_once_is_told_and_goes_on(wide, server, tmp_path, caplog):
    data = open_dataset(server.url, cache_dir=tmp_path, cache_gb=30_000 / GB)
    with open_dataset(wide).stream(8, **STREAM) as plain, data.stream(8, **STREAM) as stream:
        for a, b in itertools.islice(zip(plain, stream, strict=False), 35):
            assert a["key"] == b["key"]
    (line,) = [line for line in caplog.messages if "IS TOO SMALL" in line]
    assert "data.cache_gb=3e-05" in line
    assert "Set data.cache_gb=" in line


def test_processes_share_a_small_cache(wide, server, tmp_path):
    """Three ranks, each an epoch with little room: each has its samples, the limit holds."""
    limit = size_of(wide) * 2 // 3
    script = (
        "import sys, itertools\n"
        "from shards import open_dataset\n"
        "url, cache, gb, rank = sys.argv[1:]\n"
        "data = open_dataset(url, cache_dir=cache, cache_gb=float(gb))\n"
        "options = dict(levels=(4,), num_lanes=4, window_shards=2, seed=5)\n"
        "with data.stream(12, rank=int(rank), world_size=3, **options) as stream:\n"
        "    for batch in itertools.islice(stream, 40):\n"
        "        print(*batch['key'])\n"
    )
    command = [sys.executable, "-c", script, server.url, str(tmp_path), str(limit / GB)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    runs = [
        subprocess.Popen(
            [*command, str(rank)], cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for rank in range(3)
    ]
    most: list[int] = []
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            most.append(size_of(tmp_path))

    watcher = threading.Thread(target=watch)
    watcher.start()
    outputs = [run.communicate(timeout=120) for run in runs]
    done.set()
    watcher.join()
    assert [run.returncode for run in runs] == [0, 0, 0], outputs
    for rank, (shown, _) in enumerate(outputs):
        options = STREAM | {"rank": rank, "world_size": 3}
        with open_dataset(wide).stream(12, **options) as stream:
            expected = [batch["key"] for batch in itertools.islice(stream, 40)]
        assert [line.split() for line in shown.decode().splitlines()] == expected
    assert max(most) <= limit
    # Evicted and fetched again here and there, but far from once per rank and epoch.
    assert len(tars(server.requests)) < 2 * 3 * 60


def test_reading_by_number_needs_no_more_room_than_one_shard(wide, server, tmp_path, caplog):
    caplog.set_level(logging.WARNING, "shards")
    limit = size_of(wide) - 50 * (wide / NAMES[0]).stat().st_size
    data = open_dataset(server.url, cache_dir=tmp_path, cache_gb=limit / GB)
    keys = [data.sample(number).key for number in range(data.num_samples())]
    assert keys == open_dataset(wide).keys()
    assert size_of(tmp_path) <= limit
    assert caplog.messages == []
    everything = data.read(np.arange(240), levels=(4,))
    assert everything["key"] == keys
    assert any("IS TOO SMALL" in line for line in caplog.messages)
