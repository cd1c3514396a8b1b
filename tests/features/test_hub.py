"""Checkpoints by hub name, from a hub that runs in this process."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from dinogen.config import GuideConfig
from dinogen.features import GuideError, load_guide
from dinogen.features import checkpoint as hub_module
from dinogen.features.checkpoint import weights_reachable

COMMIT = "0123456789abcdef0123456789abcdef01234567"
NAME = "someone/dinov2-tiny"


class Hub(BaseHTTPRequestHandler):
    """The three requests of the real hub that matter: listing, HEAD and GET of a file."""

    files: dict[str, bytes]

    def _answer(self, body: bytes, *, send: bool) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{hash(body) & 0xFFFFFF:x}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if send:
            self.wfile.write(body)

    def _handle(self, *, send: bool) -> None:
        path = self.path.split("?")[0]
        if path.startswith(f"/api/models/{NAME}"):
            names = [{"rfilename": name} for name in self.files]
            listing = {"id": NAME, "sha": COMMIT, "siblings": names}
            if "/tree/" in path:
                body = [
                    {"type": "file", "path": name, "size": len(data), "oid": "0"}
                    for name, data in self.files.items()
                ]
                return self._answer(json.dumps(body).encode(), send=send)
            return self._answer(json.dumps(listing).encode(), send=send)
        name = path.rsplit("/", 1)[-1]
        if path.startswith(f"/{NAME}/resolve/") and name in self.files:
            return self._answer(self.files[name], send=send)
        return self.send_error(404)

    def do_GET(self) -> None:
        self._handle(send=True)

    def do_HEAD(self) -> None:
        self._handle(send=False)

    def log_message(self, *args) -> None:
        pass


@contextlib.contextmanager
def serving(handler):
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Point huggingface_hub at another hub and an empty cache."""
    from huggingface_hub import constants

    def use(endpoint: str, *, offline: bool = False) -> None:
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(
            constants,
            "HUGGINGFACE_CO_URL_TEMPLATE",
            endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        )
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    return use


def load(path):
    return load_guide(GuideConfig(path=path), torch.device("cpu"))


def test_by_hub_name_then_offline_from_the_cache(checkpoint, hub):
    files = {p.name: p.read_bytes() for p in checkpoint.iterdir()}
    handler = type("FilledHub", (Hub,), {"files": files | {"pytorch_model.bin": b"a pickle"}})
    with serving(handler) as endpoint:
        hub(endpoint)
        assert weights_reachable(NAME) == "hub"
        guide = load(NAME)
    assert guide.info.revision == COMMIT
    assert guide.info.weights_sha256 == load(str(checkpoint)).info.weights_sha256

    hub("http://127.0.0.1:9", offline=True)
    assert weights_reachable(NAME) == "hub cache"
    assert load(NAME).info == guide.info


@pytest.mark.parametrize("offline", [True, False])
def test_without_network_the_error_says_what_to_do(hub, offline):
    hub("http://127.0.0.1:9", offline=offline)
    start = time.monotonic()
    assert weights_reachable(NAME) is None
    with pytest.raises(
        GuideError, match=rf"guide\.path: {NAME}: there is no folder of that name, and "
    ) as caught:
        load(NAME)
    assert time.monotonic() - start < 30
    assert f"hf download {NAME}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_hub_that_never_answers_costs_no_more_than_the_probe(hub, monkeypatch):
    monkeypatch.setattr(hub_module, "_PROBE_SECONDS", 0.3)
    release = threading.Event()

    class Silent(Hub):
        def do_HEAD(self) -> None:
            release.wait(60)

    with serving(Silent) as endpoint:
        hub(endpoint)
        start = time.monotonic()
        assert weights_reachable(NAME) is None
        assert time.monotonic() - start < 15
        release.set()


def test_local_folders(checkpoint, tmp_path, hub):
    hub("http://127.0.0.1:9")
    assert weights_reachable(str(checkpoint)) == "local folder"
    assert weights_reachable(str(tmp_path / "none")) is None
    with pytest.raises(GuideError, match="neither a folder nor a hub name"):
        load(str(tmp_path / "none"))
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"a pickle, never opened")
    assert weights_reachable(str(tmp_path)) is None
    with pytest.raises(GuideError, match=r"lacks config\.json or \*\.safetensors"):
        load(str(tmp_path))


def test_a_file_is_never_asked_of_the_hub(checkpoint, monkeypatch):
    """With one slash in it, `guide/model.safetensors` looks like a hub name."""
    import huggingface_hub

    monkeypatch.chdir(checkpoint.parent)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: 1 / 0)
    assert weights_reachable("checkpoint/model.safetensors") is None
    with pytest.raises(GuideError, match=r"model\.safetensors is a file: give the folder that"):
        load("checkpoint/model.safetensors")
