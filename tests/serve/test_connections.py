"""Silent connections and half requests are closed, and keep nobody out meanwhile."""

from __future__ import annotations

import select
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from dinogen.serve import server
from dinogen.serve.app import MAX_WAITING
from dinogen.serve.server import open_site

HALF = b"GET /picture.png HTTP/1.1\r\nHost: localhost\r\nX: "


@pytest.fixture
def url(runs, monkeypatch):
    """A run that is served by a thread, with a short deadline."""
    monkeypatch.setattr(server, "HEAD_SECONDS", 1.0)
    site = open_site(runs["guided"], "127.0.0.1", 0)
    thread = threading.Thread(target=site.run, daemon=True)
    thread.start()
    yield site.url
    site._server.should_exit = True
    thread.join(60)
    assert not thread.is_alive()


def connect(url):
    """A plain connection to the site."""
    found = httpx.URL(url)
    return socket.create_connection((found.host, found.port), timeout=60)


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
    silent = [connect(url) for _ in range(3 * server.MAX_SILENT)]
    for sock in silent:
        sock.sendall(sent)
    for _ in range(3):
        assert httpx.get(url, timeout=60).status_code == 200
    assert httpx.get(f"{url}picture.png?seed=1", timeout=60).content.startswith(b"\x89PNG")
    assert all(closed_after(sock) < 30 for sock in silent)
    assert httpx.get(url, timeout=60).status_code == 200


def test_a_drop_at_a_time_prolongs_nothing(url):
    with connect(url) as sock:
        began = time.monotonic()
        try:
            for byte in HALF * 20:
                sock.sendall(bytes([byte]))
                time.sleep(0.05)
        except (BrokenPipeError, ConnectionResetError):
            pass
        assert time.monotonic() - began < 30  # all of it would take 52 s


def test_a_request_that_takes_long_is_answered(runs, url, monkeypatch):
    """The deadline is that of asking, not of drawing; and one behind it counts again."""
    from dinogen.serve.gallery import Gallery

    draw = Gallery.draw

    def slowly(self, query):
        time.sleep(1.5)
        return draw(self, query)

    monkeypatch.setattr(Gallery, "draw", slowly)
    with httpx.Client() as client:
        for seed in (1, 2):
            found = client.get(f"{url}picture.png?seed={seed}", timeout=60)
            assert found.content.startswith(b"\x89PNG")


def test_a_stage_that_cannot_be_loaded_costs_the_others_nothing(runs, tmp_path):
    import shutil

    from dinogen.serve.gallery import Gallery

    run = shutil.copytree(runs["two_stages"], tmp_path / "run")
    for state in run.glob("16x16/checkpoints/*/state.json"):
        state.write_text('{"files": {}}')
    assert list(Gallery(run).stages) == [8]


def test_who_hangs_up_frees_a_place_at_once(runs, url, monkeypatch):
    """200 clients ask and leave while an image is drawn; the next one is served, not refused."""
    from dinogen.serve.gallery import Gallery

    draw, gate, drawn = Gallery.draw, threading.Event(), []

    def slowly(self, query):
        drawn.append(query.seed)
        assert gate.wait(120)
        return draw(self, query)

    monkeypatch.setattr(Gallery, "draw", slowly)
    asked = []
    for seed in range(200):
        sock = connect(url)
        asked.append(sock)
        sock.sendall(f"GET /picture.png?seed={seed} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    until, refused = time.monotonic() + 60, []
    while len(refused) < 200 - MAX_WAITING and time.monotonic() < until:
        refused, _, _ = select.select(asked, [], [], 1)
    assert len(refused) == 200 - MAX_WAITING
    assert all(b" 503 " in sock.recv(99) for sock in refused)
    full = httpx.get(f"{url}picture.png?seed=777", timeout=60)
    assert full.status_code == 503
    assert int(full.headers["retry-after"]) > 0
    for sock in asked:
        sock.close()
    with ThreadPoolExecutor(8) as pool:
        found = [
            pool.submit(httpx.get, f"{url}picture.png?seed={900 + n}", timeout=60) for n in range(8)
        ]
        time.sleep(0.5)
        assert not any(one.done() for one in found)  # they wait; none is refused
        gate.set()
        assert [one.result(30).status_code for one in found] == [200] * 8
    # what was begun is drawn to its end, and none of those that were given up is begun
    assert drawn[0] < 200
    assert sorted(drawn[1:]) == list(range(900, 908))


def test_a_client_that_is_slow_to_read_keeps_nobody_out(url):
    slow = [connect(url) for _ in range(40)]
    for sock in slow:
        sock.sendall(b"GET /picture.png?seed=1 HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert httpx.get(f"{url}picture.png?seed=2", timeout=60).status_code in (200, 503)
    time.sleep(0.5)
    assert httpx.get(f"{url}picture.png?seed=3", timeout=60).status_code == 200
    for sock in slow:
        sock.close()
