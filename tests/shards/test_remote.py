"""Remote datasets: fetched once, whole, checked; equal to the local one."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch

from shards import FetchError, ShardsError, open_dataset
from shards.check.verify import verify
from shards.errors import ManifestError

from .conftest import files_of


@pytest.fixture
def url(packed: Path) -> Iterator[str]:
    """The dataset on fsspec's file system in memory."""
    system = fsspec.filesystem("memory")
    for name, data in files_of(packed).items():
        system.pipe_file(f"/bucket/faces/{name}", data)
    yield "memory://bucket/faces"
    system.rm("/bucket", recursive=True)


def test_remote_equals_local(url: str, packed: Path, tmp_path: Path):
    local, remote = open_dataset(packed), open_dataset(url, cache_dir=tmp_path)
    assert remote.manifest == local.manifest
    np.testing.assert_array_equal(remote.level_variance(4), local.level_variance(4))
    for _, a, b in zip(
        range(12),
        local.stream(8, levels=(8,), image_size=8, num_threads=0),
        remote.stream(8, levels=(8,), image_size=8, num_threads=2),
        strict=False,
    ):
        assert a["key"] == b["key"]
        assert torch.equal(a["image"], b["image"])
        assert torch.equal(a["pyramid"][8], b["pyramid"][8])
    assert verify(remote) == []


def test_only_what_is_read_is_fetched_and_only_once(url: str, tmp_path: Path, monkeypatch):
    data = open_dataset(url, cache_dir=tmp_path)
    data.read(range(3), levels=(4,))
    assert {p.name for p in tmp_path.rglob("*.tar")} == {"train-00000.tar"}
    system = fsspec.filesystem("memory")
    opened: list[str] = []
    original = type(system).open

    def watch(self, path, *args, **options):
        opened.append(path)
        return original(self, path, *args, **options)

    monkeypatch.setattr(type(system), "open", watch)
    open_dataset(url, cache_dir=tmp_path).read(range(3), levels=(4,))
    assert opened == []


def test_a_damaged_download_never_gets_its_name(url: str, tmp_path: Path):
    system = fsspec.filesystem("memory")
    data = bytearray(system.cat_file("/bucket/faces/train-00000.tar"))
    data[5000] ^= 1
    system.pipe_file("/bucket/faces/train-00000.tar", bytes(data))
    for on_error in ("stop", "skip"):
        with pytest.raises(FetchError, match=r"train-00000\.tar: differs from what manifest"):
            open_dataset(url, cache_dir=tmp_path).read([0], levels=(4,), on_error=on_error)
    assert not list(tmp_path.rglob("*.tar"))
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_dataset_packed_again_does_not_meet_its_old_cache(url: str, tmp_path: Path):
    open_dataset(url, cache_dir=tmp_path).read([0], levels=(4,))
    system = fsspec.filesystem("memory")
    manifest = system.cat_file("/bucket/faces/manifest.json")
    system.pipe_file("/bucket/faces/manifest.json", manifest.replace(b'"noise"', b'"other"'))
    assert open_dataset(url, cache_dir=tmp_path).manifest.guide["name"] == "other"
    assert len(list(tmp_path.iterdir())) == 2


def test_a_url_without_dataset_is_refused(url: str, tmp_path: Path):
    with pytest.raises(ManifestError, match=r"has no manifest\.json"):
        open_dataset("memory://bucket/nothing", cache_dir=tmp_path)
    with pytest.raises(ShardsError, match="cannot be reached"):
        open_dataset("nosuch://x/y", cache_dir=tmp_path)


def test_processes_share_one_download(packed: Path, tmp_path: Path):
    script = (
        "import sys, logging; logging.basicConfig(level=20)\n"
        "from shards import open_dataset\n"
        "data = open_dataset(sys.argv[1], cache_dir=sys.argv[2])\n"
        "for number in range(data.num_samples()):\n"
        "    data.sample(number)\n"
    )
    command = [sys.executable, "-c", script, f"file://{packed}", str(tmp_path)]
    root = Path(__file__).parents[2]
    runs = [
        subprocess.Popen(command, cwd=root, stderr=subprocess.PIPE, text=True) for _ in range(3)
    ]
    fetched = [
        line for run in runs for line in run.communicate()[1].splitlines() if "fetching" in line
    ]
    assert [run.returncode for run in runs] == [0, 0, 0]
    assert len(fetched) == len(set(fetched)) > 10
