"""Silent connections and half requests are closed, and keep nobody out meanwhile."""

from __future__ import annotations

import socket
import threading
import time

import httpx
import pytest

from dinogen.serve import connections
from dinogen.serve.server import open_site

HALF = b"GET /picture.png HTTP/1.1\r\nHost: localhost\r\nX: "


@pytest.fixture
def url(runs, monkeypatch):
    """A run that is served by a thread, with a short deadline."""
    monkeypatch.setattr(connections, "HEAD_SECONDS", 1.0)
    site = open_site(runs["guided"], "127.0.0.1", 0)
    thread = threading.Thread(target=site.run, daemon=True)
    thread.start()
    yield site.url
    site._server.should_exit = True
    thread.join(20)
    assert not thread.is_alive()


def connect(url):
    """A plain connection to the site."""
    found = httpx.URL(url)
    return socket.create_connection((found.host, found.port), timeout=10)


def closed_after(sock):
    """Seconds until the other side has closed a connection."""
    began = time.monotonic()
    try:
        while sock.recv(4096):
            pass
    except ConnectionResetError:
        pass
    return time.monotonic() - began


@pytest.mark.parametrize("sent", [b"", HALF], ids=["silent", "half a request"])
def test_others_are_served_while_many_stay_silent(url, sent):
    silent = [connect(url) for _ in range(3 * connections.MAX_SILENT)]
    for sock in silent:
        sock.sendall(sent)
    for _ in range(3):
        assert httpx.get(url, timeout=5).status_code == 200
    assert httpx.get(f"{url}picture.png?seed=1").content.startswith(b"\x89PNG")
    assert all(closed_after(sock) < 8 for sock in silent)
    assert httpx.get(url).status_code == 200


def test_a_drop_at_a_time_prolongs_nothing(url):
    with connect(url) as sock:
        began = time.monotonic()
        try:
            for byte in HALF * 20:
                sock.sendall(bytes([byte]))
                time.sleep(0.05)
        except (BrokenPipeError, ConnectionResetError):
            pass
        assert time.monotonic() - began < 6


def test_a_request_that_takes_long_is_answered(runs, url, monkeypatch):
    """The deadline is that of asking, not of drawing; and one behind it counts anew."""
    from dinogen.serve.gallery import Gallery

    draw = Gallery.draw

    def slowly(self, query):
        time.sleep(1.5)
        return draw(self, query)

    monkeypatch.setattr(Gallery, "draw", slowly)
    with httpx.Client() as client:
        for seed in (1, 2):
            found = client.get(f"{url}picture.png?seed={seed}", timeout=20)
            assert found.content.startswith(b"\x89PNG")


def test_a_stage_that_cannot_be_loaded_costs_the_others_nothing(runs, tmp_path):
    import shutil

    from dinogen.serve.gallery import Gallery

    run = shutil.copytree(runs["two_stages"], tmp_path / "run")
    for state in run.glob("16x16/checkpoints/*/state.json"):
        state.write_text('{"files": {}}')
    assert list(Gallery(run).stages) == [8]
