"""Binds a port and serves a run on it until it is interrupted."""

from __future__ import annotations

import socket
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import uvicorn

from dinogen.errors import UserError
from dinogen.serve.app import MAX_HEAD, make_app
from dinogen.serve.connections import PatientProtocol
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
        UserError: the address cannot be had.
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
