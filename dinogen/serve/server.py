"""Binds a port and serves a run on it; closes idle connections."""

from __future__ import annotations

import asyncio
import socket
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from dinogen.errors import UserError
from dinogen.serve.app import MAX_HEAD, make_app
from dinogen.serve.gallery import Gallery

LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class Site:
    """A run on its port, ready to be served.

    Attributes:
        url: its address.
        private: whether only this machine can reach it.
    """

    url: str
    private: bool
    _listener: socket.socket
    _server: uvicorn.Server

    def run(self) -> None:
        """Serve until the process is interrupted."""
        with self._listener, suppress(KeyboardInterrupt):
            self._server.run(sockets=[self._listener])


def open_site(run: Path, host: str, port: int) -> Site:
    """Take the port, then load the run.

    Args:
        run: folder of the run.
        host: address to bind to.
        port: 0 takes any free one.

    Raises:
        ConfigError: ``run`` is no run, or has no complete checkpoint.
        UserError: the address is not available.
    """
    listener = _listen(host, port)
    try:
        gallery = Gallery(run)
    except BaseException:
        listener.close()
        raise
    name = f"[{host}]" if ":" in host else host
    private = host in LOOPBACK
    config = uvicorn.Config(
        make_app(gallery, ["127.0.0.1", "localhost", "[::1]"] if private else ["*"]),
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        ws="none",
        http=PatientProtocol,
        h11_max_incomplete_event_size=MAX_HEAD,
        # an image of a large diffusion model takes long; do not wait for it after Ctrl-C
        timeout_graceful_shutdown=1,
    )
    url = f"http://{name}:{listener.getsockname()[1]}/"
    return Site(url, private, listener, uvicorn.Server(config))


def _listen(host: str, port: int) -> socket.socket:
    """A bound socket."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise UserError(
            f"--host {host} --port {port}: {error.strerror}: choose another, or --port 0 for any "
            "free one"
        ) from None


# seconds until the head of a request must have arrived, from the connection or the last response
HEAD_SECONDS = 10.0
# connections without a complete request; beyond it the oldest is closed
MAX_SILENT = 64
# age in seconds below which none is closed in favour of another: connections that arrive together
# are all accepted before any request is read
GRACE = 1.0
# connections without a complete request, of any age; processes can often open only 1024 files
MAX_OPEN = 512


class PatientProtocol(H11Protocol):
    """uvicorn's HTTP/1.1 with a deadline for the head of a request.

    uvicorn counts every open connection against its limit and waits forever for its first
    bytes: 64 idle sockets, which browsers open in advance, would lock everybody out. Here only
    connections without a request count, and a new one replaces the oldest.
    """

    _silent: ClassVar[OrderedDict[PatientProtocol, float]] = OrderedDict()  # since when

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self._deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start waiting for a request."""
        super().connection_made(transport)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop waiting."""
        self._settle()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Receive part of a request, which does not extend the deadline."""
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        """Start waiting for the next request."""
        super().on_response_complete()
        self._watch()

    def _watch(self) -> None:
        """Set the deadline, unless a request is being answered."""
        if self.cycle is not None and not self.cycle.response_complete:
            self._settle()
        elif self._deadline is None and not self.transport.is_closing():
            self._deadline = self.loop.call_later(HEAD_SECONDS, self._give_up)
            self._silent[self] = self.loop.time()
            while len(self._silent) > MAX_SILENT:
                oldest, since = next(iter(self._silent.items()))
                if len(self._silent) <= MAX_OPEN and self.loop.time() - since < GRACE:
                    break
                oldest._give_up()

    def _settle(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
        self._silent.pop(self, None)

    def _give_up(self) -> None:
        self._settle()
        self.transport.abort()
