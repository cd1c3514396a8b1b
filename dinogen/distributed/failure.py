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

_EVERY = 0.3  # seconds between two looks
# Seconds without a sign of life after which a rank is gone. torchrun notices a killed one at once;
# this is for launchers that do not, and must not take one for dead that is held up by its disk.
_SILENT = 60.0
_GRACE = 3.0  # seconds that a rank has to end by itself, once another one failed
_HEARING = 2.0  # seconds that rank 0 stays for others to hear why it fails
_LEAVING = 30.0  # seconds that rank 0 stays for others to come to the end
_times = itertools.count()


@contextmanager
def failure_propagation() -> Iterator[None]:
    """Context of all that ranks do together; does nothing for one process alone.

    The rank that fails first keeps its exception and says what happened. The others end with the
    same exit code: by their own exception, such as a broken connection, or by force.

    Raises:
        dist.DistError: another rank is gone without a word: killed, or its node died.
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
    """Looks whether another rank has failed, and ends this process if it does not end itself.

    Each rank gives signs of life, and the one before it listens: where ranks wait for each other
    without a connection, as in :func:`dist.rank_zero_section` or while DeepSpeed makes its groups,
    nothing else would tell that one was killed.
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
        store.set(f"beat/{process_group.rank()}", "0")  # from now on silence is missed

    def report(self, text: str, code: int, lost: bool = False) -> None:
        """Tell the others that this rank fails.

        Args:
            text: why.
            code: what all ranks end with.
            lost: every rank finds out by itself, so none has to be told.

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
        """Look until :meth:`stop`."""
        while not self.done.wait(_EVERY):
            try:
                self._beat()
                if not self.store.check(["failed"]):
                    continue
                failure = json.loads(self.store.get("failed"))
            except RuntimeError:
                return  # its host is gone: torchrun or the connections will tell
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
            self.store.set(f"beat/{process_group.rank()}", "")  # who listens need not worry

    def stop(self) -> None:
        """This process ends by itself."""
        self.done.set()
        self.join(_EVERY)

    def _beat(self) -> None:
        """Give a sign of life, and report the next rank where it gives none.

        Looks are counted, not seconds: a machine that slept has missed nothing.
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
