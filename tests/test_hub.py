"""Addresses of the hub against a stand-in of it: parsed, fetched, cached, pinned, refused."""

from __future__ import annotations

import errno
import logging

import pytest

from dinogen import hub
from dinogen.config import dump_config, load_config, parse_config
from tests.hub_server import hub_server, use_hub

NAME = "someone/faces"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def server(tmp_path, monkeypatch):
    with hub_server() as found:
        use_hub(monkeypatch, found, tmp_path / "home")
        yield found


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("hf://someone/faces", hub.Address(NAME)),
        ("hf:/someone/faces", hub.Address(NAME)),  # as pathlib writes it
        ("hf://someone/faces@v1.0", hub.Address(NAME, revision="v1.0")),
        ("hf://someone/faces@refs/pr/3/a", hub.Address(NAME, revision="refs/pr/3", subpath="a")),
        ("hf://someone/faces@a%2Fb/c", hub.Address(NAME, revision="a/b", subpath="c")),
        ("hf://someone/faces/a/b.safetensors", hub.Address(NAME, subpath="a/b.safetensors")),
        ("hf://datasets/someone/faces/64", hub.Address(NAME, dataset=True, subpath="64")),
    ],
)
def test_addresses(text, address):
    assert hub.parse(text) == address
    assert hub.parse(str(address)) == address


@pytest.mark.parametrize(
    "text",
    [
        "hf://",
        "hf://someone",
        "hf://someone/",
        "hf://datasets/someone",
        "hf://spaces/someone/faces",
        "hf://someone/fa ces",
        "hf://someone/faces@",
        "hf://someone/faces/../other",
        "hf://someone/faces/a//b",
        "hf:///someone/faces",
    ],
)
def test_what_is_no_address(text):
    assert hub.is_address(text)
    with pytest.raises(hub.HubError, match=r"hf:/.*: write hf://user/name, hf://user/name@rev"):
        hub.parse(text)
    assert not hub.is_address(f"./{text}")


def test_fetched_once_and_then_without_network(server, monkeypatch):
    commit = server.add(NAME, {"a.txt": b"a", "sub/b.txt": b"b", "sub/c.bin": b"c"})
    found = hub.fetch(hub.parse("hf://someone/faces/sub"), ["b.*"])
    assert found.commit == commit
    assert [one.name for one in found.path.iterdir()] == ["b.txt"]
    assert hub.local_path("hf://someone/faces/sub/c.bin", "key").read_bytes() == b"c"
    asked = len(server.requests)
    pinned = hub.Address(NAME, revision=commit, subpath="sub")
    assert sorted(one.name for one in hub.fetch(pinned).path.iterdir()) == ["b.txt", "c.bin"]
    assert server.requests[asked:] == []

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert hub.fetch(hub.parse("hf://someone/faces/sub"), ["b.*"]).commit == commit
    with pytest.raises(hub.HubError, match="not in the cache, and HF_HUB_OFFLINE is set"):
        hub.fetch(hub.parse("hf://someone/other"))


def test_each_failure_is_one_line_that_says_what_to_do(server, tmp_path, monkeypatch):
    def refused(text: str) -> str:
        with pytest.raises(hub.HubError) as caught:
            hub.fetch(hub.parse(text))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    server.add(NAME, {"a.txt": b"a"})
    server.add("someone/gated", {"a.txt": b"a"}, gated=True)
    server.add("someone/private", {"a.txt": b"a"}, private=True)
    assert "no such repository, or a private one" in refused("hf://someone/nothing")
    assert "has no revision v9: give a commit" in refused("hf://someone/faces@v9")
    assert "has no file or folder b.txt (commit " in refused("hf://someone/faces/b.txt")
    gated = refused("hf://someone/gated")
    assert f"accept its terms on {server.url}/someone/gated, then log in" in gated
    assert hub.fetch(hub.parse("hf://someone/private")).path.is_dir()
    use_hub(monkeypatch, server, tmp_path / "stranger", token=None)
    assert "if it is private, log in with `hf auth login`" in refused("hf://someone/private")
    server.fault = lambda request: 403
    assert "the hub refuses (403 Forbidden" in refused("hf://someone/faces")
    server.fault = lambda request: 503
    assert f"cannot be downloaded from {server.url}" in refused("hf://someone/faces")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert "cannot be downloaded from http://127.0.0.1:9" in refused("hf://someone/faces")


def test_a_download_that_breaks_off_is_continued_or_refused(server):
    server.add(NAME, {"a.bin": bytes(range(200))})
    broken = []

    def once(request: str) -> str | None:
        if request.startswith("GET") and request.endswith("a.bin") and not broken:
            broken.append(request)
            return "cut"
        return None

    server.fault = once
    assert hub.local_path("hf://someone/faces/a.bin", "key").read_bytes() == bytes(range(200))
    assert broken

    server.add(NAME, {"b.bin": bytes(1000)})
    server.fault = lambda request: "cut" if request.startswith("GET /someone") else None
    with pytest.raises(hub.HubError, match=r"key: hf://someone/faces/b\.bin: cannot be downloaded"):
        hub.local_path("hf://someone/faces/b.bin", "key")


def test_a_full_disk_is_named(server, monkeypatch):
    def full(*args: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "/cache/blobs/1")

    monkeypatch.setattr("huggingface_hub.snapshot_download", full)
    with pytest.raises(hub.HubError, match=r"No space left on device: /cache/blobs/1.*HF_HOME"):
        hub.fetch(hub.parse("hf://someone/faces"))


def test_names_of_what_is_cached(server, tmp_path):
    commit = server.add(NAME, {"model.safetensors": b"", "other/G.safetensors": b""})
    whole = hub.fetch(hub.parse("hf://someone/faces")).path
    assert hub.cached_name(whole / "model.safetensors") == f"someone--faces-{commit[:7]}"
    other = whole / "other" / "G.safetensors"
    assert hub.cached_name(other) == f"someone--faces-{commit[:7]}-other-G"
    assert hub.shown(other) == f"hf://someone/faces@{commit}/other/G.safetensors"
    assert hub.cached_name(tmp_path) is None
    assert hub.shown(tmp_path) == str(tmp_path)


def test_a_repository_without_a_generator(server):
    server.add(NAME, {"config.yaml": b"", "pytorch_model.bin": b"a pickle"})
    with pytest.raises(hub.HubError, match=r"holds no generator of dinogen, neither model\.safe"):
        hub.local_weights("hf://someone/faces")
    assert not any("pytorch_model.bin" in request for request in server.requests)


def begun(config):
    """Let the run begin: its config.yaml is there, and so is a stage."""
    (config.run / "4x4" / "checkpoints").mkdir(parents=True)
    (config.run / "config.yaml").write_text(dump_config(config))


def test_a_run_keeps_its_commits_when_a_branch_moves(server, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    old = server.add(NAME, {"a.txt": b"1"})
    data = server.add("datasets/someone/shards", {"manifest.json": b"{}"})
    config = parse_config(
        {
            "run": str(tmp_path / "run"),
            "guide": {"path": "hf://someone/faces/sub"},
            "clip": {"path": "hf://someone/faces", "revision": "main"},
            "data": {"path": "hf://datasets/someone/shards"},
            "notes": {"next": "hf://someone/else"},
            "metrics": {"inception": "hf://nobody/nothing/pt_inception.pth"},
        }
    )
    first = hub.pinned(config)
    assert first.guide.path == f"hf://someone/faces@{old}/sub"
    assert (first.clip.path, first.clip.revision) == ("hf://someone/faces", old)
    assert first.data.path == f"hf://datasets/someone/shards@{data}"
    assert first.notes == config.notes
    assert first.metrics == config.metrics
    assert "NOT PINNED: metrics.inception: hf://nobody/nothing: no such repository" in caplog.text
    assert hub.pinned(first) == first
    begun(first)

    new = server.add(NAME, {"a.txt": b"2"})
    asked = len(server.requests)
    again = hub.pinned(config, resolve=False)
    assert again.guide == first.guide
    assert server.requests[asked:] == []
    again = hub.pinned(config)
    assert again.guide == first.guide
    assert f"stays at commit {old}, with which this run began" in caplog.text
    assert again.clip.revision == new
    assert f"MOVED: clip.path: hf://someone/faces@main was commit {old}" in caplog.text
    assert load_config(config.run / "config.yaml").guide == first.guide


def test_without_network_a_run_is_pinned_to_what_the_cache_holds(server, tmp_path, monkeypatch):
    commit = server.add(NAME, {"a.txt": b"1"})
    hub.fetch(hub.parse("hf://someone/faces"), ["a.txt"])
    config = parse_config({"run": str(tmp_path / "run"), "init_from": "hf://someone/faces"})
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert hub.pinned(config).init_from == f"hf://someone/faces@{commit}"


def test_two_revisions_are_refused(tmp_path):
    section = {"path": "hf://someone/faces@v1", "revision": "v2"}
    config = parse_config({"run": str(tmp_path / "run"), "guide": section})
    said = r"guide\.path: hf://someone/faces@v1 and guide\.revision=v2 both name a revision"
    with pytest.raises(hub.HubError, match=said):
        hub.pinned(config)
