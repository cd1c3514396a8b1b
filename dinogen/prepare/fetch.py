"""Fetch one file over HTTP: attempts, resuming, checksum."""

from __future__ import annotations

import email.utils
import hashlib
import json
import os
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import httpx

from dinogen.files import write_json
from dinogen.prepare.links import Item

_RETRIED = frozenset({408, 425, 429, 500, 502, 503, 504})
_FIRST_WAIT = 1.0  # s; doubles with each attempt that brought nothing new
_LONGEST_WAIT = 60.0  # s; of our own choice, a server's Retry-After may be longer
_LONGEST_RETRY_AFTER = 3600.0  # s; beyond it the file counts as failed


@dataclass(frozen=True)
class Failure:
    """One file that could not be had.

    Attributes:
        url: its address.
        filename: what it would have been called.
        reason: ``http_404`` and the like, ``connection``, ``checksum``, ``protocol`` or
            ``retry_after``.
        detail: for a person.
    """

    url: str
    filename: str
    reason: str
    detail: str


class Stopped(Exception):
    """The whole download was interrupted; what was fetched stays for the next run."""


class _Permanent(Exception):
    """Trying again would not help."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


class _Passing(Exception):
    """Trying again may help, after ``wait`` seconds at least."""

    def __init__(self, reason: str, detail: str, wait: float = 0.0) -> None:
        super().__init__(detail)
        self.reason = reason
        self.wait = wait


class Fetcher:
    """Fetches files into one folder; may be used by several threads.

    Args:
        client: follows redirects.
        folder: where the files go.
        num_attempts: in a row that may bring no new byte of a file before it counts as failed.
        sleep: waits between attempts; by default until :attr:`stop` is set.

    Attributes:
        stop: set it to end all threads' work with :class:`Stopped`.
        num_bytes: received so far.
    """

    def __init__(
        self,
        client: httpx.Client,
        folder: Path,
        num_attempts: int,
        sleep: Callable[[float], object] | None = None,
    ) -> None:
        self.stop = threading.Event()
        self.num_bytes = 0
        self._client = client
        self._folder = folder
        self._num_attempts = num_attempts
        self._sleep = sleep or self.stop.wait
        self._lock = threading.Lock()

    def fetch(self, item: Item) -> bool | Failure:
        """True if the file was fetched, False if it was there already.

        Raises:
            Stopped: :attr:`stop` was set.
            OSError: the folder cannot be written.
        """
        final = self._folder / item.filename
        if final.is_file() and (item.sha256 is None or _sha256(final) == item.sha256):
            return False
        part = self._folder / f".{item.filename}.part"
        furthest = _size(part)
        num_fruitless = num_mismatches = 0
        while True:
            try:
                self._attempt(item, part)
                found = _sha256(part) if item.sha256 else None
                if found == item.sha256:
                    part.replace(final)
                    _discard(part)
                    return True
                _discard(part)
                num_mismatches += 1
                detail = f"sha256 is {found}, the list says {item.sha256}"
                # Once may come of a resumed file that had changed; twice is the server's file.
                if num_mismatches == 2:
                    raise _Permanent("checksum", detail)
                raise _Passing("checksum", detail)
            except _Permanent as error:
                _discard(part)
                return Failure(item.url, item.filename, error.reason, str(error))
            except _Passing as error:
                # A server that breaks off again and again still gets the file across.
                num_fruitless = 0 if _size(part) > furthest else num_fruitless + 1
                furthest = max(furthest, _size(part))
                if num_fruitless >= self._num_attempts:
                    return Failure(item.url, item.filename, error.reason, str(error))
                own = min(_FIRST_WAIT * 2 ** max(0, num_fruitless - 1), _LONGEST_WAIT)
                # Spread, so that files that failed together do not come back together.
                self._sleep(max(own * random.uniform(0.5, 1.0), error.wait))

    def _attempt(self, item: Item, part: Path) -> None:
        """Bring ``part`` to the end of the file; raises if it does not get there."""
        if self.stop.is_set():
            raise Stopped
        offset, validator = _resumable(item, part)
        headers = {"Range": f"bytes={offset}-"} if offset else {}
        if offset and validator:
            headers["If-Range"] = validator
        try:
            with self._client.stream("GET", item.url, headers=headers) as response:
                if response.status_code == 416 and offset:
                    if response.headers.get("Content-Range") == f"bytes */{offset}":
                        return  # killed after the last byte
                    _discard(part)
                    raise _Passing("protocol", f"the server has no byte {offset}")
                _check_status(response)
                if response.status_code == 206:
                    span = response.headers.get("Content-Range", "")
                    if not span.startswith(f"bytes {offset}-"):
                        _discard(part)
                        raise _Passing("protocol", f"asked for byte {offset}, got '{span}'")
                else:
                    offset = 0
                    _discard(part)
                    _remember(item, part, response)
                self._receive(response, part, offset)
        except (httpx.InvalidURL, httpx.UnsupportedProtocol, httpx.TooManyRedirects) as error:
            raise _Permanent("protocol", str(error)) from None
        except httpx.HTTPError as error:
            raise _Passing("connection", str(error) or type(error).__name__) from None

    def _receive(self, response: httpx.Response, part: Path, offset: int) -> None:
        with part.open("ab" if offset else "wb") as file:
            for chunk in response.iter_raw():
                if self.stop.is_set():
                    raise Stopped
                file.write(chunk)
                with self._lock:
                    self.num_bytes += len(chunk)
            file.flush()
            os.fsync(file.fileno())


def _check_status(response: httpx.Response) -> None:
    status = response.status_code
    detail = f"{status} {response.reason_phrase}".strip()
    if status in _RETRIED:
        wait = _retry_after(response.headers.get("Retry-After"))
        if wait > _LONGEST_RETRY_AFTER:
            raise _Permanent("retry_after", f"{detail}, to be tried again in {wait:.0f} s")
        raise _Passing(f"http_{status}", detail, wait)
    if status not in (200, 206):
        raise _Permanent(f"http_{status}", detail)
    encoding = response.headers.get("Content-Encoding", "identity")
    if encoding != "identity":
        raise _Permanent("protocol", f"sent {encoding}-encoded though asked not to")


def _retry_after(value: str | None) -> float:
    """Seconds, from a number or a date (RFC 9110, 10.2.3); 0 if absent or meaningless."""
    if value is None:
        return 0.0
    if value.strip().isdigit():
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return 0.0


def _note(part: Path) -> Path:
    """Where it stands which file the bytes of ``part`` belong to."""
    return part.with_name(part.name + ".json")


def _remember(item: Item, part: Path, response: httpx.Response) -> None:
    # A weak ETag promises the same meaning, not the same bytes (RFC 9110, 13.1.5).
    etag = response.headers.get("ETag", "")
    strong = "" if etag.startswith("W/") else etag
    validator = strong or response.headers.get("Last-Modified")
    write_json(_note(part), {"url": item.url, "validator": validator})


def _resumable(item: Item, part: Path) -> tuple[int, str | None]:
    """Byte to go on from, and what proves that the server's file is still the same."""
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


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
