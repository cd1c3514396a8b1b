"""Download a list of files, several at a time: resumed, checked, named by content."""

from __future__ import annotations

import csv
import errno
import io
import json
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import httpx

from dinogen.files import write_json, write_text
from dinogen.prepare.download.links import (
    PHOTO_SUFFIXES,
    Failure,
    Item,
    address,
    read_list,
    shown,
    shown_url,
)
from dinogen.prepare.photos.read import PrepareError
from shards.files import sha256_file
from shards.remote.download import (
    PASSING_STATUS,
    Damaged,
    raise_if_stopped,
    retry,
    retry_after,
    stop_at,
)

__all__ = ["DownloadSummary", "Failure", "download"]

_FAILED = "failed.csv"


@dataclass(frozen=True)
class DownloadSummary:
    """The outcome of a download.

    Attributes:
        num_files: different files in the list, including lines that cannot be used.
        num_present: of these, files that were already there, checked if a checksum is known.
        num_fetched: of these, files fetched now.
        failures: the others, in the order of the list.
        num_repeated: further lines that repeat a file of an earlier line.
        num_bytes: received now.
        seconds: duration.
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

    A file gets its name only when it is complete and its checksum is right. Until then its bytes
    are in ``.NAME.part`` beside it; the next attempt, also after a kill, resumes there if the file
    is known to be the same (by a checksum in the list, or an ETag or Last-Modified date of the
    server) and starts again otherwise. If neither the list nor the address gives a name with a
    suffix, the suffix is that of the received image. A file that should be an image but is not,
    such as a web page with an error message, is not kept. ``failed.csv`` lists what was not
    fetched, including lines that cannot be used, with line and reason; it is absent if nothing
    failed.

    Args:
        listing: text or CSV file, see :func:`dinogen.prepare.download.links.read_list`.
        folder: created if missing.
        num_parallel: files fetched at the same time.
        num_attempts: attempts in a row without a new byte after which a file counts as failed.
        timeout: seconds without an answer or a byte after which an attempt ends.
        progress: called with the number of files done, of all files, and of bytes received.
        sleep: called with the seconds to wait between attempts; by default an interruptible wait.

    Raises:
        PrepareError: the list is missing or is no text, none of its lines can be used, or the
            folder cannot be written; then nothing is fetched.
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
    # Photos are already compressed, and a compressed answer could not be resumed.
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


_HEAD = 512  # bytes, enough to tell what a file is
_IMAGES = {
    rb"\xff\xd8\xff": ".jpg",
    rb"\x89PNG\r\n": ".png",
    rb"RIFF....WEBP": ".webp",
    rb"II[*+]\0|MM\0[*+]": ".tif",
    rb"GIF8[79]a": ".gif",
    rb"BM.{4}\0{4}": ".bmp",
    rb".{4}ftypavi[fs]": ".avif",
    rb".{4}ftyp(hei[cmsx]|hev[cmsx]|mif1|msf1)": ".heic",
    rb"\xff\x0a|\0{3}\x0cJXL ": ".jxl",
    rb"\0{3}\x0cjP  ": ".jp2",
}
_WEB_PAGE = re.compile(rb"(\xef\xbb\xbf)?\s*<(!doctype html|html|head|body|script|!--)", re.I)
# Errors of one file name in a writable folder.
_NAME_ERRORS = frozenset(
    {errno.EISDIR, errno.ENOTDIR, errno.ENOTEMPTY, errno.ENAMETOOLONG, errno.EINVAL, errno.EILSEQ}
    | {errno.EACCES, errno.EPERM}
)


class _Fault(Exception):
    """A failed attempt; another may succeed after ``wait`` seconds; None: never."""

    def __init__(self, reason: str, detail: str, wait: float | None = 0.0) -> None:
        super().__init__(detail)
        self.reason = reason
        self.wait = wait


class _WrongBytes(_Fault, Damaged):
    """The checksum is wrong. The first time, the cause may be a resumed file that had changed."""


class Fetcher:
    """Fetches files into one folder; safe to use from several threads.

    Args:
        client: has to follow redirects.
        folder: where the files are written.
        num_attempts: attempts in a row without a new byte after which a file counts as failed.
        sleep: called instead of waiting between attempts.

    Attributes:
        num_bytes: received so far.
    """

    def __init__(
        self,
        client: httpx.Client,
        folder: Path,
        num_attempts: int,
        sleep: Callable[[float], object] | None = None,
    ) -> None:
        self.num_bytes = 0
        self._client = client
        self._folder = folder
        self._num_attempts = num_attempts
        self._sleep = sleep
        self._lock = threading.Lock()

    def fetch(self, item: Item) -> bool | Failure:
        """True if the file was fetched, False if it was there already.

        Raises:
            shards.remote.download.Stopped: this thread has to stop; what was fetched stays for the
                next run.
            OSError: the folder cannot be written.
        """
        part = self._folder / f".{item.filename}.part"
        try:
            if self._is_there(item):
                return False
            retry(
                lambda: self._attempt(item, part),
                shown_url(item.url),
                lambda error: error.wait if isinstance(error, _Fault) else None,
                tries=self._num_attempts,
                progress=lambda: _size(part),
                sleep=self._sleep,
                level=logging.DEBUG,
            )
        except _Fault as fault:
            if fault.wait is None and fault.reason != "retry_after":
                _discard(part)
            reason, detail = fault.reason, str(fault)
        except OSError as error:
            if error.errno not in _NAME_ERRORS:
                raise
            _discard(part)
            reason, detail = "unwritable", str(error)
        else:
            return True
        return Failure(item.line, shown_url(item.url), item.filename, reason, shown(detail))

    def _is_there(self, item: Item) -> bool:
        """Whether an earlier run fetched it, with any suffix that its content gave it."""
        for path in self._candidates(item):
            if not path.is_file() or (item.sha256 and sha256_file(path) != item.sha256):
                continue
            try:
                final = self._folder / _final_name(item, path)
            except _Fault:
                continue  # stored by a version that did not check: a web page, an empty file
            if final != path:
                path.rename(final)
            return True
        return False

    def _candidates(self, item: Item) -> Iterator[Path]:
        yield self._folder / item.filename
        if item.by_content:
            for suffix in _IMAGES.values():
                yield self._folder / f"{item.filename}{suffix}"

    def _attempt(self, item: Item, part: Path) -> None:
        """Complete a file and rename it; raises if that fails."""
        self._receive(item, part)
        found = sha256_file(part) if item.sha256 else None
        if found != item.sha256:
            _discard(part)
            raise _WrongBytes("checksum", f"sha256 is {found}, the list says {item.sha256}")
        part.replace(self._folder / _final_name(item, part))
        _discard(part)

    def _receive(self, item: Item, part: Path) -> None:
        offset, validator = _resumable(item, part)
        headers = {"Range": f"bytes={offset}-"} if offset else {}
        if offset and validator:
            headers["If-Range"] = validator
        try:
            with self._client.stream("GET", address(item.url), headers=headers) as response:
                if response.status_code == 416 and offset:
                    if response.headers.get("Content-Range") == f"bytes */{offset}":
                        return  # killed after the last byte
                    _discard(part)
                    raise _Fault("protocol", f"the server's file has no byte {offset}")
                _check_status(response)
                if response.status_code == 206:
                    span = response.headers.get("Content-Range", "")
                    if not span.startswith(f"bytes {offset}-"):
                        _discard(part)
                        raise _Fault("protocol", f"requested from byte {offset}, got '{span}'")
                else:
                    offset = 0
                    _discard(part)
                    if not _is_encoded(response):
                        _remember(item, part, response)
                chunks = response.iter_bytes if _is_encoded(response) else response.iter_raw
                with part.open("ab" if offset else "wb") as file:
                    for chunk in chunks():
                        raise_if_stopped()
                        file.write(chunk)
                        with self._lock:
                            self.num_bytes += len(chunk)
                    file.flush()
                    os.fsync(file.fileno())
        except (httpx.InvalidURL, httpx.UnsupportedProtocol, httpx.TooManyRedirects) as error:
            raise _Fault("protocol", str(error), wait=None) from None
        except UnicodeError as error:  # a redirect to a host that cannot be looked up
            raise _Fault("protocol", str(error), wait=None) from None
        except httpx.HTTPError as error:
            # A certificate does not become valid within minutes.
            wait = None if "CERTIFICATE_VERIFY_FAILED" in str(error) else 0.0
            raise _Fault("connection", str(error) or type(error).__name__, wait) from None


def _check_status(response: httpx.Response) -> None:
    status = response.status_code
    detail = f"{status} {response.reason_phrase}".strip()
    if status in PASSING_STATUS:
        asked = response.headers.get("Retry-After")
        wait = retry_after(asked)
        if wait is None:
            raise _Fault("retry_after", f"{detail}, the server asks to wait for '{asked}'", wait)
        raise _Fault(f"http_{status}", detail, wait)
    if status not in (200, 206):
        raise _Fault(f"http_{status}", detail, wait=None)
    encoding = response.headers.get("Content-Encoding", "")
    if _is_encoded(response) and (status == 206 or encoding.lower() not in ("gzip", "deflate")):
        raise _Fault("protocol", f"sent {encoding}-encoded, which was not requested", wait=None)


def _is_encoded(response: httpx.Response) -> bool:
    """Whether a server compresses without being asked: such a download cannot be resumed."""
    return response.headers.get("Content-Encoding", "identity").lower() not in ("", "identity")


def _final_name(item: Item, path: Path) -> str:
    """The name of a file, now that its content is known.

    Raises:
        _Fault: it is not what the list requests. A checksum in the list overrides this check.
    """
    with path.open("rb") as file:
        head = file.read(_HEAD)
    suffix = next((s for magic, s in _IMAGES.items() if re.match(magic, head, re.S)), None)
    if suffix is not None:
        return item.filename + suffix if item.by_content else item.filename
    if item.sha256:
        return item.filename
    if not head:
        raise _Fault("empty", "the server sent no data", wait=None)
    is_page = _WEB_PAGE.match(head) is not None
    called = PurePosixPath(item.filename).suffix.lower()
    begins = f"begins with {head[:24]!r}"
    if item.by_content or called in PHOTO_SUFFIXES:
        what = "a web page instead of an image" if is_page else "not an image"
        raise _Fault("not_an_image", f"{what}: {begins}", wait=None)
    if is_page and called not in (".html", ".htm", ".xhtml", ".txt"):
        raise _Fault("web_page", f"a web page instead of the file: {begins}", wait=None)
    return item.filename


def _note(part: Path) -> Path:
    """The file that records which file the bytes of ``part`` belong to."""
    return part.with_name(part.name + ".json")


def _remember(item: Item, part: Path, response: httpx.Response) -> None:
    # A weak ETag promises the same meaning, not the same bytes (RFC 9110, 13.1.5).
    etag = response.headers.get("ETag", "")
    strong = "" if etag.startswith("W/") else etag
    validator = strong or response.headers.get("Last-Modified")
    write_json(_note(part), {"url": item.url, "validator": validator})


def _resumable(item: Item, part: Path) -> tuple[int, str | None]:
    """Byte to resume from, and what proves that the server's file is still the same."""
    try:
        offset = part.stat().st_size
        note = json.loads(_note(part).read_bytes())
        same = note["url"] == item.url
        validator: str | None = note["validator"]
    except (OSError, ValueError, KeyError, TypeError):
        return 0, None  # nothing there, or of unknown origin
    return (offset, validator) if same and (validator or item.sha256) else (0, None)


def _discard(part: Path) -> None:
    part.unlink(missing_ok=True)
    _note(part).unlink(missing_ok=True)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
