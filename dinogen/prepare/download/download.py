"""Download a list of files, several at a time, and say which were not fetched and why."""

from __future__ import annotations

import csv
import io
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import httpx

from dinogen.files import write_text
from dinogen.prepare.download.files import Fetcher
from dinogen.prepare.download.links import Failure, Item, read_list, shown
from dinogen.prepare.photos.read import PrepareError
from shards.remote.download import stop_at

__all__ = ["DownloadSummary", "Failure", "download"]

_FAILED = "failed.csv"


@dataclass(frozen=True)
class DownloadSummary:
    """What became of a list.

    Attributes:
        num_files: different files that the list asks for, lines that cannot be used included.
        num_present: of these, files that were there already, checked where a checksum is known.
        num_fetched: of these, files fetched now.
        failures: the others, in the order of the list.
        num_repeated: lines beyond these that name a file of an earlier line again.
        num_bytes: received now.
        seconds: taken.
    """

    num_files: int
    num_present: int
    num_fetched: int
    failures: tuple[Failure, ...]
    num_repeated: int
    num_bytes: int
    seconds: float


def download(
    listing: Path,
    folder: Path,
    *,
    num_parallel: int = 8,
    num_attempts: int = 5,
    timeout: float = 60.0,
    progress: Callable[[int, int, int], None] | None = None,
    sleep: Callable[[float], object] | None = None,
) -> DownloadSummary:
    """Fetch every file of a list into one folder.

    A file takes its place only when it is complete and its checksum is right. Until then its
    bytes lie beside it as ``.NAME.part``; the next attempt, also after a kill, goes on from there
    if the file is known to be the same one (a checksum in the list, or an ETag or Last-Modified
    date of the server) and begins again otherwise. Where neither the list nor the address gives a
    name with a suffix, the suffix is that of the image that came. A file that should be an image
    and is none, such as a web page that says why there is no photo, is not kept. What was not
    fetched stands with its line and the reason in ``failed.csv``, which is absent if nothing
    failed; that includes lines that cannot be used.

    Args:
        listing: text or CSV file, see :func:`dinogen.prepare.download.links.read_list`.
        folder: made if missing.
        num_parallel: files fetched at the same time.
        num_attempts: in a row that may bring no new byte of a file before it counts as failed.
        timeout: seconds without an answer or a byte after which an attempt ends.
        progress: called with the number of files done, of all files, and of bytes received.
        sleep: waits so many seconds between attempts; by default it ends with an interruption.

    Raises:
        PrepareError: the list is missing or is no text, none of its lines can be used, or the
            folder cannot be written; nothing is fetched then.
        OSError: the disk is full.
    """
    started = time.monotonic()
    listed = read_list(listing, reserved={_FAILED})
    items = listed.items
    if folder.exists() and not folder.is_dir():
        raise PrepareError(f"{folder}: is a file: choose a folder")
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PrepareError(f"{folder}: cannot be written: choose another folder")
    if not items:
        _write_failed(folder / _FAILED, listed.bad)
        first = listed.bad[0]
        raise PrepareError(
            f"{listing}: none of its lines can be used (all in {folder / _FAILED}); "
            f"line {first.line}: {first.reason}: {shown(first.url)}: {first.detail}"
        )
    outcomes: dict[Item, bool | Failure] = {}
    stop = threading.Event()
    limits = httpx.Limits(max_connections=num_parallel)
    # A photo is compressed already, and a compressed answer could not be resumed.
    headers = {"Accept-Encoding": "identity", "User-Agent": "dinogen"}
    with (
        httpx.Client(
            follow_redirects=True, timeout=timeout, limits=limits, headers=headers
        ) as client,
        ThreadPoolExecutor(num_parallel, "download", stop_at, (stop,)) as pool,
    ):
        fetcher = Fetcher(client, folder, num_attempts, sleep)
        futures = {pool.submit(fetcher.fetch, item): item for item in items}
        try:
            for future in as_completed(futures):
                outcomes[futures[future]] = future.result()
                if progress is not None:
                    progress(len(outcomes), len(items), fetcher.num_bytes)
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise
    failures = [*listed.bad, *(o for o in outcomes.values() if isinstance(o, Failure))]
    failures.sort(key=lambda failure: failure.line)
    _write_failed(folder / _FAILED, failures)
    num_fetched = sum(outcome is True for outcome in outcomes.values())
    return DownloadSummary(
        num_files=len(items) + len(listed.bad),
        num_present=sum(outcome is False for outcome in outcomes.values()),
        num_fetched=num_fetched,
        failures=tuple(failures),
        num_repeated=listed.num_repeated,
        num_bytes=fetcher.num_bytes,
        seconds=round(time.monotonic() - started, 3),
    )


def _write_failed(path: Path, failures: Sequence[Failure]) -> None:
    if not failures:
        path.unlink(missing_ok=True)
        return
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["line", "url", "filename", "reason", "detail"])
    writer.writerows([f.line, f.url, f.filename, f.reason, f.detail] for f in failures)
    write_text(path, buffer.getvalue())
