"""Binds a port and serves a run on it; closes connections that say nothing."""

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
        url: where it will be found.
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
        port: 0 takes any that is free.

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
        # a picture of a large diffusion model takes long; nobody waits for it after Ctrl-C
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
            f"--host {host} --port {port}: {error.strerror}: name another, or --port 0 for any "
            "that is free"
        ) from None


# seconds in which the head of a request has to be there, from the connection or the last answer on
HEAD_SECONDS = 10.0
# connections without a whole request; of more the oldest is closed
MAX_SILENT = 64
# seconds for which none is closed in favour of another: many that come at once are all accepted
# before any of their requests is read
GRACE = 1.0
# connections without a whole request, whatever their age; a process may often open 1024 files
MAX_OPEN = 512


class PatientProtocol(H11Protocol):
    """uvicorn's HTTP/1.1 with a deadline for the head of a request.

    uvicorn counts every open connection against its limit and waits for ever for the first bytes
    of one: 64 silent sockets, such as a browser opens ahead of need, would keep everybody out.
    Here only those count that have nothing asked yet, and a new one takes the place of the oldest.
    """

    _silent: ClassVar[OrderedDict[PatientProtocol, float]] = OrderedDict()  # since when

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self._deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for a request."""
        super().connection_made(transport)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no more."""
        self._settle()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take in a part of a request; a part alone prolongs nothing."""
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        """Begin to wait for the next request."""
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
