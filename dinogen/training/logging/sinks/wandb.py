"""Weights & Biases: one run per dinogen run, online or, for a later ``wandb sync``, offline."""

from __future__ import annotations

import os
import secrets
import shutil
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from dinogen.config import Section
from dinogen.runs.values import finite
from dinogen.training.logging.sinks.base import Event, SentSink, group_of

# A .wandb file: a header, then blocks of chunks, as in LevelDB's log. A chunk is checksum, length,
# kind, data; a record is one chunk, or a first, middle ones and a last.
_HEADER, _BLOCK, _CHUNK = 7, 1 << 15, struct.Struct("<IHB")
_WHOLE, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4
_EXIT_CODES = {"done": 0, "stopped": 0, "failed": 1}


class WandbOptions(Section):
    """``logging: [{wandb: {...}}]``; what is left out, W&B's own variables and settings say."""

    project: str | None = Field(None, description="default: WANDB_PROJECT, or dinogen")
    entity: str | None = Field(None, description="user or team")
    group: str | None = Field(
        None, description="default: the study's name, if the run is part of one"
    )
    name: str | None = Field(None, description="name of the run; default: that of its folder")
    tags: tuple[str, ...] = Field((), description="tags of the run")
    mode: Literal["online", "offline", "disabled"] | None = Field(
        None, description="default: WANDB_MODE, or online"
    )


class WandbSink(SentSink):
    """History by step (images seen), sample grids, config, summary and alerts.

    W&B hands what is logged to a process of its own, which writes it to disk some time later. So
    how far an offline run is, its files say, and an online one, the server.
    """

    Options = WandbOptions
    package = "wandb"
    options: WandbOptions

    def open(self) -> int | None:
        """See :class:`SentSink`."""
        import wandb

        options, record = self.options, self.record
        known = record.setdefault("id", secrets.token_hex(4))
        place = Path(os.environ.get("WANDB_DIR") or self.run.sent_folder)
        place.mkdir(parents=True, exist_ok=True)
        found = sorted(place.glob(f"wandb/offline-run-*-{known}/run-{known}.wandb"))
        files = _without_empty(found)
        # How many there have to be; None once some of it is on a server, and not here.
        expected = record.get("segments", 0)
        self._wandb = wandb
        self._run = wandb.init(
            id=known,
            resume="allow",
            dir=place,
            project=options.project or _unless("WANDB_PROJECT", "dinogen"),
            entity=options.entity,
            group=options.group or group_of(self.run),
            name=options.name or _unless("WANDB_NAME", self.run.path.name),
            tags=options.tags or None,
            mode=options.mode,
            settings=wandb.Settings(silent=True, console="off", **_patience()),
        )
        config = self.run.config.model_dump(mode="json")
        self._run.config.update(config, allow_val_change=True)
        offline_to = Path(self._run.settings.sync_dir)
        self.address = self._run.url or f"offline: wandb sync {offline_to} sends it"
        if not self._run.offline:
            record["segments"] = None
            return self._run.starting_step - 1 if self._run.resumed else -1
        if expected is None or len(found) < expected:
            record["segments"] = None
            return None
        record["segments"] = len(files) + 1
        return max((last_step(file) for file in files), default=-1)

    def write(self, event: Event) -> None:
        """See :class:`SentSink`."""
        values: dict[str, Any] = {
            name: value for name, one in event.values.items() if (value := finite(one)) is not None
        }
        values |= {name: self._wandb.Image(str(path)) for name, path in event.images.items()}
        if event.health is not None:
            values["health"] = event.health
        if event.warnings:
            values["warnings"] = "\n".join(event.warnings)
            self._run.alert(event.health or "warning", values["warnings"], level="WARN")
        values |= {"nimg": event.nimg, "stage": event.stage}
        self._run.log(values, step=event.nimg, commit=True)

    def flush(self) -> None:
        """W&B has no such request; :meth:`open` finds what did not arrive."""

    def summarize(self, values: Mapping[str, tuple[float, int]], status: Mapping[str, str]) -> None:
        """See :class:`SentSink`."""
        found: dict[str, Any] = {f"final/{name}": value for name, (value, _) in values.items()}
        self._run.summary.update(found | dict(status))

    def close(self, status: str) -> None:
        """See :class:`Sink`."""
        self._run.finish(exit_code=_EXIT_CODES[status])


def _unless(variable: str, value: str) -> str | None:
    """A default that a variable of the library's own goes before."""
    return None if os.environ.get(variable) else value


def _patience() -> dict[str, float]:
    """A shorter wait for the server than W&B's, for another attempt is made anyway."""
    return {} if os.environ.get("WANDB_INIT_TIMEOUT") else {"init_timeout": 30.0}


def _without_empty(files: list[Path]) -> list[Path]:
    """Files that hold something; the others, of killed processes, are deleted."""
    kept = []
    for file in files:
        if next(iter_records(file), None) is None:
            shutil.rmtree(file.parent, ignore_errors=True)
        else:
            kept.append(file)
    return kept


def last_step(file: Path) -> int:
    """Step of the last line in a .wandb file; -1 if there is none."""
    from google.protobuf.message import DecodeError
    from wandb.proto import wandb_internal_pb2

    proto: Any = wandb_internal_pb2
    last = -1
    for data in iter_records(file):
        try:
            record = proto.Record.FromString(data)
        except DecodeError:
            break  # damaged from here on
        if record.WhichOneof("record_type") == "history":
            last = max(last, record.history.step.num)
    return last


def iter_records(file: Path) -> Iterator[bytes]:
    """The records in a .wandb file, up to where a kill has cut it off."""
    data, at, parts = file.read_bytes(), _HEADER, b""
    while at + _CHUNK.size <= len(data):
        left = _BLOCK - at % _BLOCK
        if left < _CHUNK.size:
            at += left
            continue
        _, length, kind = _CHUNK.unpack_from(data, at)
        at += _CHUNK.size
        if at + length > len(data) or kind not in (_WHOLE, _FIRST, _MIDDLE, _LAST):
            return
        chunk = data[at : at + length]
        at += length
        parts = chunk if kind in (_WHOLE, _FIRST) else parts + chunk
        if kind in (_WHOLE, _LAST):
            yield parts
