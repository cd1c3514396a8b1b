"""Download a list of files, several at a time, and say which could not be had."""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import httpx

from dinogen.files import write_text
from dinogen.prepare.fetch import Failure, Fetcher
from dinogen.prepare.links import Item, read_list
from dinogen.prepare.read import PrepareError

__all__ = ["DownloadSummary", "Failure", "download"]

_FAILED = "failed.csv"


@dataclass(frozen=True)
class DownloadSummary:
    """What became of a list.

    Attributes:
        num_files: different files in the list.
        num_present: of these, files that were there already, checked where a checksum is known.
        num_fetched: of these, files fetched now.
        failures: the others, in the order of the list.
        num_bytes: received now.
        seconds: taken.
    """

    num_files: int
    num_present: int
    num_fetched: int
    failures: tuple[Failure, ...]
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
    date of the server) and begins again otherwise. What could not be had stands in
    ``failed.csv``, which is absent if nothing failed.

    Args:
        listing: text or CSV file, see :func:`dinogen.prepare.links.read_list`.
        folder: made if missing.
        num_parallel: files fetched at the same time.
        num_attempts: in a row that may bring no new byte of a file before it counts as failed.
        timeout: seconds without an answer or a byte after which an attempt ends.
        progress: called with the number of files done, of all files, and of bytes received.
        sleep: waits so many seconds between attempts; by default it ends with an interruption.

    Raises:
        PrepareError: the list is missing or wrong; nothing is fetched then.
        OSError: the folder cannot be written.
    """
    started = time.monotonic()
    items = read_list(listing, reserved={_FAILED})
    if folder.exists() and not folder.is_dir():
        raise PrepareError(f"{folder}: is a file: choose a folder")
    folder.mkdir(parents=True, exist_ok=True)
    outcomes: dict[Item, bool | Failure] = {}
    limits = httpx.Limits(max_connections=num_parallel)
    # A picture is compressed already, and a compressed answer could not be resumed.
    headers = {"Accept-Encoding": "identity", "User-Agent": "dinogen"}
    with (
        httpx.Client(
            follow_redirects=True, timeout=timeout, limits=limits, headers=headers
        ) as client,
        ThreadPoolExecutor(num_parallel, "download") as pool,
    ):
        fetcher = Fetcher(client, folder, num_attempts, sleep)
        futures = {pool.submit(fetcher.fetch, item): item for item in items}
        try:
            for future in as_completed(futures):
                outcomes[futures[future]] = future.result()
                if progress is not None:
                    progress(len(outcomes), len(items), fetcher.num_bytes)
        except BaseException:
            fetcher.stop.set()
            pool.shutdown(cancel_futures=True)
            raise
    in_order = [outcomes[item] for item in items]
    failures = tuple(outcome for outcome in in_order if isinstance(outcome, Failure))
    _write_failed(folder / _FAILED, failures)
    num_fetched = sum(outcome is True for outcome in in_order)
    return DownloadSummary(
        num_files=len(items),
        num_present=len(items) - num_fetched - len(failures),
        num_fetched=num_fetched,
        failures=failures,
        num_bytes=fetcher.num_bytes,
        seconds=round(time.monotonic() - started, 3),
    )


def _write_failed(path: Path, failures: Sequence[Failure]) -> None:
    if not failures:
        path.unlink(missing_ok=True)
        return
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["url", "filename", "reason", "detail"])
    writer.writerows([f.url, f.filename, f.reason, f.detail] for f in failures)
    write_text(path, buffer.getvalue())
