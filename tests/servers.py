"""An HTTP server that fails as told: of a folder, or in front of a real S3 server (moto's)."""

from __future__ import annotations

import contextlib
import functools
import http.client
import itertools
import random
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

# Faults: "reset" closes the connection at once, "cut" in the middle of the body, "flip" changes a
# byte, "slow" answers late, a number is a status.
Fault = str | int | None
ALL_FAULTS: tuple[Fault, ...] = ("reset", "cut", "flip", "slow", 500, 503)
SLOW_S = 0.2
Answer = tuple[int, dict[str, str], bytes]


@dataclass
class Faulty:
    """A running server.

    Attributes:
        url: to put before a path.
        fault: asked for every request: (name of the file, how often it was asked for before).
        requests: names of the files asked for, in order.
        faults: what was done to (name, fault).
    """

    url: str
    answer: Callable[[BaseHTTPRequestHandler], Answer]
    fault: Callable[[str, int], Fault] = lambda name, before: None
    requests: list[str] = field(default_factory=list)
    faults: list[tuple[str, Fault]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def seldom(self, share: float, seed: int) -> None:
        """Let a share of all requests fail, each in another way."""
        rng = random.Random(seed)
        kinds = itertools.cycle(ALL_FAULTS)
        self.fault = lambda name, before: next(kinds) if rng.random() < share else None

    def once(self, name: str, fault: Fault) -> None:
        """Let the first request for a file fail."""
        self.fault = lambda asked, before: fault if asked == name and before == 0 else None

    def always(self, name: str, fault: Fault) -> None:
        """Let every request for a file fail; for all files whose name ends so."""
        self.fault = lambda asked, before: fault if asked.endswith(name) else None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Header and body are written one after the other: 40 ms each time otherwise.
    disable_nagle_algorithm = True
    state: Faulty

    def do_GET(self) -> None:
        self._serve()

    def do_HEAD(self) -> None:
        self._serve()

    def _serve(self) -> None:
        name = unquote(self.path.partition("?")[0]).rpartition("/")[2]
        state = self.state
        with state.lock:
            fault = state.fault(name, state.requests.count(name))
            state.requests.append(name)
            if fault is not None:
                state.faults.append((name, fault))
        status, headers, body = state.answer(self)
        if fault == "slow":
            time.sleep(SLOW_S)
        elif fault == "reset":
            # No goodbye: the other side sees "connection reset by peer".
            linger = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.close_connection = True
            return
        elif fault == "flip" and body:
            middle = len(body) // 2
            body = body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :]
        elif isinstance(fault, int):
            status, headers, body = fault, {}, b"a fault of the test"
        self.send_response(status)
        for key, value in headers.items():
            if key.lower() not in ("content-length", "connection", "transfer-encoding", "server"):
                self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        with contextlib.suppress(ConnectionError):
            self.wfile.write(body[: len(body) // 2] if fault == "cut" else body)
        if fault == "cut":
            self.close_connection = True

    def log_message(self, *args: object) -> None:
        """Say nothing."""


@contextmanager
def _server(answer: Callable[[BaseHTTPRequestHandler], Answer]) -> Iterator[Faulty]:
    handler = type("Handler", (_Handler,), {})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    handler.state = state = Faulty(f"http://127.0.0.1:{server.server_port}", answer)
    # shutdown() waits for up to one interval, half a second by default.
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join(60)


@contextmanager
def http_server(folder: Path) -> Iterator[Faulty]:
    """Serve the files of a folder."""

    def answer(request: BaseHTTPRequestHandler) -> Answer:
        path = folder / unquote(request.path).lstrip("/")
        if not path.is_file():
            return 404, {}, b""
        return 200, {}, path.read_bytes()

    with _server(answer) as state:
        yield state


@contextmanager
def s3_server(folder: Path, bucket: str = "faces") -> Iterator[Faulty]:
    """Serve the files of a folder as s3://BUCKET/data/NAME; faults come in front of moto's server.

    `url` is the endpoint.
    """
    import boto3

    host, port = _moto()
    # What another test has put there goes.
    reset = http.client.HTTPConnection(host, port, timeout=120)
    reset.request("POST", "/moto-api/reset")
    assert reset.getresponse().status == 200
    reset.close()
    client = boto3.client(
        "s3",
        endpoint_url=f"http://{host}:{port}",
        aws_access_key_id="test",
        aws_secret_access_key="test",
        region_name="us-east-1",
    )
    client.create_bucket(Bucket=bucket)
    for path in sorted(folder.iterdir()):
        client.put_object(Bucket=bucket, Key=f"data/{path.name}", Body=path.read_bytes())
    client.close()

    def answer(request: BaseHTTPRequestHandler) -> Answer:
        upstream = http.client.HTTPConnection(host, port, timeout=120)
        upstream.request(request.command, request.path, headers=dict(request.headers))
        response = upstream.getresponse()
        found = response.status, dict(response.getheaders()), response.read()
        upstream.close()
        return found

    with _server(answer) as state:
        yield state


@functools.cache
def _moto() -> tuple[str, int]:
    """Where moto's server listens: one for all tests of a process, as it takes long to stop."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    return server.get_host_and_port()


def s3_environment(endpoint: str) -> dict[str, str]:
    """What a user of MinIO puts into the environment."""
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
