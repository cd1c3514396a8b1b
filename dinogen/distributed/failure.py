"""One rank's failure ends all ranks within seconds, with its message.

Otherwise the others wait for it in a collective until that times out, half an hour later, and the
last thing in the log is the time-out instead of the reason.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from dinogen.distributed import process_group
from dinogen.errors import UserError

log = logging.getLogger(__name__)

_EVERY = 0.3  # seconds between two polls
# Seconds without a sign of life after which a rank is gone. torchrun notices a killed one at once;
# this is for launchers that do not; a rank that waits for its disk must not be taken for dead.
_SILENT = 60.0
_GRACE = 3.0  # seconds that a rank has to end by itself, once another one failed
_HEARING = 2.0  # seconds that rank 0 stays for others to read why it failed
_LEAVING = 30.0  # seconds that rank 0 stays for others to reach the end
_times = itertools.count()


@contextmanager
def failure_propagation() -> Iterator[None]:
    """Context around everything that ranks do together; does nothing for a single process.

    The rank that fails first keeps its exception and says what happened. The others end with the
    same exit code: by their own exception, such as a broken connection, or by force.

    Raises:
        DistError: another rank disappeared: it was killed, or its node died.
        SystemExit: another rank failed before this one.
    """
    store = process_group.control_store()
    if store is None:
        yield
        return
    watcher = _Watcher(store)
    watcher.start()
    end = f"end {next(_times)}"
    try:
        yield
        process_group.linger(end, range(process_group.world_size()), _LEAVING)
    except UserError as error:
        if error.agreed:
            process_group.linger(end, range(process_group.world_size()), _LEAVING)
        else:
            watcher.report(str(error), error.exit_code)
        raise
    except (Exception, KeyboardInterrupt, SystemExit) as error:
        if not process_group.lost_connection(error):
            watcher.report(f"{type(error).__name__}: {error}", 1)
            raise
        text = "the connection to another rank is lost: it was killed, or its node died"
        watcher.report(text, 1, lost=True)
        raise process_group.DistError(
            f"{text}; the same command goes on from the last checkpoint ({error})"
        ) from error
    finally:
        watcher.stop()


class _Watcher(threading.Thread):
    """Watches for the failure of another rank, and ends this process if it does not end by itself.

    Each rank gives signs of life, and the one before it listens: where ranks wait for each other
    without a connection, as in :func:`process_group.rank_zero_section` or while DeepSpeed makes
    its groups, nothing else would show that one was killed.
    """

    def __init__(self, store: Any) -> None:
        super().__init__(name="failures", daemon=True)
        self.store = store
        self.done = threading.Event()
        self.heard: dict[str, Any] | None = None
        self.beats = 0
        self.next = (process_group.rank() + 1) % process_group.world_size()
        self.last_beat = b""
        self.num_silent = 0
        store.set(f"beat/{process_group.rank()}", "0")  # from now on silence counts

    def report(self, text: str, code: int, lost: bool = False) -> None:
        """Tell the others that this rank fails.

        Args:
            text: why.
            code: what all ranks end with.
            lost: every rank notices by itself, so rank 0 does not wait for them.

        Raises:
            SystemExit: another one was first, and has said why.
        """
        mine = {"rank": process_group.rank(), "text": text, "code": code, "lost": lost}
        try:
            first = json.loads(self.store.compare_set("failed", "", json.dumps(mine)))
        except RuntimeError:  # the store went down with its rank
            if self.heard is None:
                return
            first = self.heard
        if not first["lost"]:
            others = set(range(process_group.world_size())) - {first["rank"]}
            process_group.linger("heard", others, _HEARING)
        if first != mine:
            self._tell(first)
            raise SystemExit(first["code"])

    def run(self) -> None:
        """Poll until :meth:`stop`."""
        while not self.done.wait(_EVERY):
            try:
                self._beat()
                if not self.store.check(["failed"]):
                    continue
                failure = json.loads(self.store.get("failed"))
            except RuntimeError:
                return  # its host is gone: torchrun or broken connections end this process
            if failure["rank"] == process_group.rank():
                return
            self.heard = failure
            process_group.linger("heard", (), 0)
            if self.done.wait(_GRACE):
                return
            self._tell(failure)
            sys.stderr.flush()
            os._exit(failure["code"])
        with suppress(RuntimeError):
            self.store.set(f"beat/{process_group.rank()}", "")  # an empty beat means a normal end

    def stop(self) -> None:
        """This process ends by itself."""
        self.done.set()
        self.join(_EVERY)

    def _beat(self) -> None:
        """Give a sign of life, and report the next rank if it gives none.

        Polls are counted, not seconds, so that a machine that slept reports nobody.
        """
        self.beats += 1
        self.store.set(f"beat/{process_group.rank()}", str(self.beats))
        key = f"beat/{self.next}"
        beat = self.store.get(key) if self.store.check([key]) else b""
        self.num_silent = self.num_silent + 1 if beat and beat == self.last_beat else 0
        self.last_beat = beat
        if self.num_silent * _EVERY >= _SILENT:
            text = f"no sign of life for {_SILENT:.0f} s: it was killed, or its node died"
            failure = {"rank": self.next, "text": text, "code": 1, "lost": True}
            self.store.compare_set("failed", "", json.dumps(failure))

    def _tell(self, failure: dict[str, Any]) -> None:
        if process_group.local_rank() == 0:
            log.error(
                "rank %d ends, because rank %d failed: %s",
                process_group.rank(),
                failure["rank"],
                failure["text"],
            )
