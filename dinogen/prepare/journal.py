"""What became of each photo, kept while a preparation is unfinished."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from dinogen.prepare.faces.crop import Crop, Rejection
from dinogen.prepare.photos.changed import FileRecord, caption_record
from dinogen.prepare.photos.read import PrepareError

JOURNAL = "prepare.jsonl"
_FORMAT = "dinogen-journal"


@dataclass
class Outcome:
    """One photo that was gone through.

    Attributes:
        source: its path relative to the folder searched.
        hashes: per crop, key and perceptual hash (16 hex digits; None if none was computed).
        rejected: reason and detail of each face, or of the photo, that is not used.
        file: what tells the photo's file from its replacement, see
            :func:`dinogen.prepare.photos.changed.record_of`; None if an older version wrote the line.
        caption: of its crops, as :func:`dinogen.prepare.photos.changed.caption_record` gives it; None
            likewise.
    """

    source: str
    hashes: dict[str, str | None] = field(default_factory=dict)
    rejected: list[tuple[str, str]] = field(default_factory=list)
    file: FileRecord | None = None
    caption: str | None = None


class Journal:
    """One line per photo, appended as soon as the photo is done; a torn last line is dropped.

    Shards hold what was accepted, but not which photos were rejected; without the journal each
    resumed run would detect faces in those again. Use it as a context manager.

    Args:
        path: the file; made, or taken up if an interrupted run left it.
        src: folder of the photos.

    Attributes:
        outcomes: by the photo's source; the latest counts.

    Raises:
        PrepareError: the file belongs to other photos, or is damaged before its last line.
    """

    def __init__(self, path: Path, src: Path) -> None:
        self.outcomes: dict[str, Outcome] = {}
        self._path = path
        header = {"format": _FORMAT, "src": str(src.resolve())}
        whole = b""
        if path.exists():
            data = path.read_bytes()
            whole = data[: data.rfind(b"\n") + 1]
        if whole:
            self._take_up(whole.splitlines(), header)
        self._file = path.open("r+b" if path.exists() else "w+b")
        self._file.truncate(len(whole))
        self._file.seek(len(whole))
        if not whole:
            self._append(header)

    def record(self, items: Iterable[Crop | Rejection]) -> Iterator[Crop]:
        """Pass crops on and write down each photo's outcome when it is complete.

        Args:
            items: those of one photo follow each other.
        """
        current: Outcome | None = None
        for item in items:
            source = item.source if isinstance(item, Rejection) else item.meta["source"]
            if current is None or current.source != source:
                if current is not None:
                    self._write(current)
                current = Outcome(source, file=item.file)
            if isinstance(item, Rejection):
                current.rejected.append((item.reason, item.detail))
            else:
                current.hashes[item.key] = item.meta.get("phash")
                current.caption = caption_record(item.caption)
                yield item
        if current is not None:
            self._write(current)

    def remove(self) -> None:
        """Delete the file: the preparation is finished."""
        self._path.unlink()

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def _take_up(self, lines: list[bytes], header: dict[str, str]) -> None:
        try:
            found, *outcomes = (json.loads(line) for line in lines)
            if found != header:
                raise PrepareError(
                    f"{self._path}: an unfinished preparation of other photos "
                    f"({found.get('src')}) lies here: go on with those, or delete "
                    f"{self._path.parent}"
                )
            for values in outcomes:
                outcome = Outcome(
                    values["source"],
                    values["hashes"],
                    [(r, d) for r, d in values["rejected"]],
                    values.get("file"),
                    values.get("caption"),
                )
                self.outcomes[outcome.source] = outcome
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise PrepareError(
                f"{self._path}: damaged ({error}): delete it; photos that were rejected are gone "
                "through again"
            ) from error

    def _write(self, outcome: Outcome) -> None:
        self.outcomes[outcome.source] = outcome
        self._append(vars(outcome))

    def _append(self, value: object) -> None:
        self._file.write(json.dumps(value).encode() + b"\n")
        self._file.flush()
