"""Faults of network and server: tried again, told, and never a sample out of its place."""

from __future__ import annotations

import importlib
import itertools
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from launch.cli.main import app
from shards import Dataset, FetchError, open_dataset
from shards.check.verify import verify
from shards.errors import ManifestError
from shards.remote.download import hurry
from tests.servers import Faulty, http_server, s3_environment, s3_server

ROOT = Path(__file__).parents[2]
STREAM = {"levels": (4, 16), "image_size": 16}


@dataclass
class Served:
    """A dataset behind a server that fails as told."""

    server: Faulty
    url: str


@pytest.fixture(params=["http", "s3"])
def served(request, packed: Path, monkeypatch) -> Iterator[Served]:
    monkeypatch.setattr("shards.remote.download.FIRST_WAIT_S", 0.001)
    serve = http_server if request.param == "http" else s3_server
    with serve(packed) as server:
        for name, value in s3_environment(server.url).items():
            monkeypatch.setenv(name, value)
        yield Served(server, server.url if request.param == "http" else "s3://faces/data")


@pytest.fixture
def web(packed: Path, monkeypatch) -> Iterator[Served]:
    """The same by HTTP alone, for what does not depend on the protocol."""
    monkeypatch.setattr("shards.remote.download.FIRST_WAIT_S", 0.001)
    with http_server(packed) as server:
        yield Served(server, server.url)


def batches(data: Dataset, num_batches: int, **options) -> list[dict]:
    with data.stream(8, **(STREAM | options)) as stream:
        return list(itertools.islice(stream, num_batches))


def assert_equal(a: list[dict], b: list[dict]) -> None:
    assert [batch["key"] for batch in a] == [batch["key"] for batch in b]
    for left, right in zip(a, b, strict=True):
        assert torch.equal(left["position"], right["position"])
        assert torch.equal(left["image"], right["image"])
        assert all(torch.equal(left["pyramid"][g], right["pyramid"][g]) for g in (4, 16))


@pytest.mark.parametrize("num_threads", [0, 2])
def test_a_tenth_of_all_requests_may_fail(served, packed, tmp_path, num_threads, caplog):
    expected = batches(open_dataset(packed), 15)
    num_faults = 0
    for seed in range(4):
        served.server.seldom(0.1, seed)
        data = open_dataset(served.url, cache_dir=tmp_path / str(seed))
        options = {"num_threads": num_threads, "on_error": ("stop", "skip")[seed % 2]}
        with data.stream(8, **STREAM, **options) as stream:
            assert_equal(list(itertools.islice(stream, 15)), expected)
            assert stream.num_skipped == 0
        num_faults = len(served.server.faults)
    assert num_faults >= 4
    assert "trying again in" in caplog.text


@pytest.mark.parametrize("fault", ["reset", "cut", "flip", 500, 503, 429])
def test_each_fault_is_tried_again(served, packed, tmp_path, fault, caplog):
    name = "train-00000.tar"
    served.server.once(name, fault)
    got = open_dataset(served.url, cache_dir=tmp_path).read(range(3), levels=(4,))
    assert torch.equal(
        got["pyramid"][4], open_dataset(packed).read(range(3), levels=(4,))["pyramid"][4]
    )
    assert served.server.faults == [(name, fault)]
    assert served.server.requests.count(name) == 2
    told = [line for line in caplog.messages if "trying again" in line]
    if fault == "reset" and not told:
        return  # on a connection that was used before, drivers ask again by themselves
    (line,) = told
    assert f"{served.url}/{name}: " in line
    assert "(try 2 of 8)" in line
    if isinstance(fault, int) and served.url.startswith("http"):
        assert str(fault) in line


def test_an_index_that_arrives_damaged_is_fetched_again(served, tmp_path, caplog):
    name = "train-00000.index.npz"
    served.server.once(name, "flip")
    open_dataset(served.url, cache_dir=tmp_path).read([0], levels=(4,))
    assert served.server.requests.count(name) == 2
    assert "making it again" not in caplog.text


@pytest.mark.parametrize(
    ("fault", "num_requests", "words"),
    [
        ("flip", 3, r"(differs from what|Checksum).*, on every try; .* upload it again"),
        (503, 8, r"8 tries in .*check the server and the network"),
        ("cut", 8, r"8 tries in"),
        (403, 1, "one try.*give credentials with read access"),
        (404, 1, "is missing, although manifest.json names it"),
    ],
)
def test_what_does_not_pass_ends_in_both_modes(served, tmp_path, fault, num_requests, words):
    served.server.always("train-00001.tar", fault)
    for number, on_error in enumerate(("stop", "skip"), 1):
        data = open_dataset(served.url, cache_dir=tmp_path)
        with pytest.raises(FetchError, match=rf"{served.url}/train-00001\.tar: .*{words}"):
            data.read([8], levels=(4,), on_error=on_error)
        assert served.server.requests.count("train-00001.tar") == number * num_requests
        # What was not damaged is there, and the next call may have more luck.
        served.server.fault, before = (lambda name, times: None), served.server.fault
        if on_error == "skip":
            assert data.read([8], levels=(4,), on_error=on_error)["key"]
        served.server.fault = before
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize("on_error", ["stop", "skip"])
def test_a_stream_ends_rather_than_pass_over_a_shard(web, tmp_path, on_error):
    web.server.always("train-00002.tar", 500)
    data = open_dataset(web.url, cache_dir=tmp_path)
    with pytest.raises(FetchError, match=r"train-00002\.tar: .*500"):
        batches(data, 15, on_error=on_error)


def test_a_lost_index_is_made_from_its_shard(web, packed, tmp_path):
    web.server.always("npz", 404)
    data = open_dataset(web.url, cache_dir=tmp_path)
    assert_equal(batches(data, 8), batches(open_dataset(packed), 8))


def test_a_manifest_cut_short_is_read_again(web, packed, tmp_path):
    text = (packed / "manifest.json").read_bytes()
    answer = web.server.answer
    short = iter([text[:-100]])
    # By a server that does not say how long its answer is, so that nobody notices.
    web.server.answer = lambda request: (200, {}, next(short, None) or answer(request)[2])
    assert open_dataset(web.url, cache_dir=tmp_path).manifest == open_dataset(packed).manifest
    web.server.answer = answer
    with pytest.raises(ManifestError, match="has no manifest"):
        open_dataset(f"{web.url}/nothing", cache_dir=tmp_path)


def test_a_server_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr("shards.remote.download.FIRST_WAIT_S", 0.001)
    with pytest.raises(FetchError, match=r"http://127\.0\.0\.1:9/manifest\.json: .*8 tries"):
        open_dataset("http://127.0.0.1:9", cache_dir=tmp_path)


@pytest.mark.parametrize(
    ("url", "module", "driver"),
    [
        ("s3://bucket/x", "s3fs", "s3fs"),
        ("https://host/x", "aiohttp", "aiohttp"),
        ("sftp://host/x", "paramiko", "paramiko"),
        ("gs://bucket/x", "gcsfs", "gcsfs"),
    ],
)
def test_a_missing_driver_is_named(url, module, driver, tmp_path, monkeypatch):
    protocol = url.partition("://")[0]
    monkeypatch.delitem(
        importlib.import_module("fsspec.registry")._registry, protocol, raising=False
    )
    for name in [name for name in sys.modules if name.partition(".")[0] in (module, "fsspec")]:
        if name.startswith("fsspec.implementations.") or name.partition(".")[0] == module:
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(FetchError, match=rf"not installed: run `pip install {driver}`"):
        open_dataset(url, cache_dir=tmp_path)


def test_missing_credentials_are_an_error_at_once(tmp_path, monkeypatch):
    for name in list(os.environ):
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    began = time.monotonic()
    with pytest.raises(FetchError, match="AWS_ACCESS_KEY_ID"):
        open_dataset("s3://bucket/x", cache_dir=tmp_path)
    assert time.monotonic() - began < 50


def test_hurried_it_gives_up_soon(web, tmp_path, monkeypatch):
    data = open_dataset(web.url, cache_dir=tmp_path)
    web.server.always("tar", 503)
    monkeypatch.setattr("shards.remote.download.FIRST_WAIT_S", 60.0)
    errors: list[BaseException] = []

    def read() -> None:
        try:
            data.read([0], levels=(4,))
        except FetchError as error:
            errors.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    wait_for(lambda: "train-00000.tar" in web.server.requests)
    time.sleep(0.2)
    began = time.monotonic()
    monkeypatch.setattr("shards.remote.download.HURRY_S", 1.0)
    hurry()
    reader.join(120)
    assert 1 < time.monotonic() - began < 50
    assert "asked to stop" in str(errors[0])


def test_hurried_it_still_gets_what_fails_once(web, tmp_path, monkeypatch):
    data = open_dataset(web.url, cache_dir=tmp_path)
    hurry()
    web.server.once("train-00000.tar", 503)
    monkeypatch.setattr("shards.remote.download.FIRST_WAIT_S", 60.0)
    assert data.read([0], levels=(4,))["key"]


def test_closing_a_stream_waits_for_no_fetch(web, tmp_path, monkeypatch):
    data = open_dataset(web.url, cache_dir=tmp_path)
    web.server.always("tar", 503)
    monkeypatch.setattr("shards.remote.download.FIRST_WAIT_S", 60.0)
    stream = data.stream(8, num_threads=2, **STREAM)

    def read() -> None:
        with pytest.raises(FetchError):
            next(stream)

    reader = threading.Thread(target=read)
    reader.start()
    wait_for(lambda: any(name.endswith(".tar") for name in web.server.requests))
    began = time.monotonic()
    stream.close()
    reader.join(120)
    assert time.monotonic() - began < 50
    wait_for(lambda: not [t for t in threading.enumerate() if t.name == "shards-prefetch"])


@pytest.mark.parametrize("num_threads", [0, 2])
def test_ctrl_c_ends_the_wait(web, tmp_path, num_threads):
    web.server.always("tar", 503)
    script = (
        "import signal, sys, shards.remote.download\n"
        # a shell ignores it for what it starts in the background, which is inherited
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "shards.remote.download.FIRST_WAIT_S = 60.0\n"
        "from shards import open_dataset\n"
        "data = open_dataset(sys.argv[1], cache_dir=sys.argv[2])\n"
        "with data.stream(8, levels=(4,), num_threads=int(sys.argv[3])) as stream:\n"
        "    next(stream)\n"
    )
    command = [sys.executable, "-c", script, web.url, str(tmp_path), str(num_threads)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: any(name.endswith(".tar") for name in web.server.requests))
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=120)
    assert "KeyboardInterrupt" in told
    assert process.returncode != 0


def test_commands_take_a_url(served, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    listed = CliRunner().invoke(app, ["shards", "ls", served.url])
    assert listed.exit_code == 0, listed.output
    assert "train-00003.tar" in listed.output
    assert not list(tmp_path.rglob("*.tar"))
    command = ["shards", "verify", served.url, "--cache-gb", "0.001"]
    sound = CliRunner().invoke(app, command)
    assert sound.exit_code == 0, sound.output
    assert "61 samples" in sound.output


def test_verify_names_what_cannot_be_fetched_and_goes_on(web, tmp_path):
    web.server.fault = lambda name, before: {"train-00001.tar": "flip", "train-00003.tar": 404}.get(
        name
    )
    problems = verify(open_dataset(web.url, cache_dir=tmp_path))
    assert [problem.shard for problem in problems] == ["train-00001.tar", "train-00003.tar"]
    assert "differs from what manifest.json says" in problems[0].what
    assert "is missing" in problems[1].what


def wait_for(condition, seconds: float = 60.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it does not come"
        time.sleep(0.01)


@pytest.fixture(autouse=True)
def _told_and_patient(caplog):
    caplog.set_level(logging.INFO)
    yield
    hurry(False)
