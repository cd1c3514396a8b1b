"""Connections that say nothing, or never finish a request, are closed and keep nobody out."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from typing import Any, ClassVar

from uvicorn.protocols.http.h11_impl import H11Protocol

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
