"""Trackio: one run per dinogen run, in a database of this machine, a Space or a server."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Any

from pydantic import Field

from dinogen.config import Section
from dinogen.runs.values import finite
from dinogen.training.logging.sinks.base import Event, SentSink, group_of


class TrackioOptions(Section):
    """``logging: [{trackio: {...}}]``; what is left out, Trackio's own variables say."""

    project: str = Field("dinogen", description="which dashboard")
    space_id: str | None = Field(
        None, description="Hugging Face Space, such as user/faces; default: this machine"
    )
    group: str | None = Field(
        None, description="default: the study's name, if the run is part of one"
    )
    name: str | None = Field(
        None, description="begin of the run's name; default: that of its folder"
    )


class TrackioSink(SentSink):
    """Values by step (images seen), sample grids, config and alerts.

    Trackio continues a run by its name, so a name is given to no two runs.
    """

    Options = TrackioOptions
    package = "trackio"
    options: TrackioOptions

    def open(self) -> int | None:
        """See :class:`SentSink`."""
        import trackio

        options = self.options
        name = options.name or self.run.path.name
        known = self.record.setdefault("name", f"{name}-{secrets.token_hex(3)}")
        self._trackio = trackio
        self._run = trackio.init(
            project=options.project,
            name=known,
            group=options.group or group_of(self.run),
            space_id=options.space_id,
            config=self.run.config.model_dump(mode="json"),
            resume="allow",
            embed=False,
        )
        where = options.space_id or "trackio show"
        self.address = f"run {known} of project {options.project} ({where})"
        # Read from the database as the run begins; there is no public name for it.
        there: int = self._run._next_step - 1
        # A server that does not answer has not said that it has nothing.
        return there if self._run._is_local or there >= 0 else None

    def write(self, event: Event) -> None:
        """See :class:`SentSink`."""
        values: dict[str, Any] = {
            name: value for name, one in event.values.items() if (value := finite(one)) is not None
        }
        values |= {name: self._trackio.Image(str(path)) for name, path in event.images.items()}
        if event.health is not None:
            values["health"] = event.health
        values |= {"nimg": event.nimg, "stage": event.stage}
        self._run.log(values, step=event.nimg)
        for warning in event.warnings:
            self._run.alert(event.health or "warning", warning, step=event.nimg)

    def flush(self) -> None:
        """Trackio has no such request; :meth:`open` finds what did not arrive."""

    def summarize(self, values: Mapping[str, tuple[float, int]], status: Mapping[str, str]) -> None:
        """See :class:`SentSink`."""
        found: dict[str, Any] = {f"final/{name}": value for name, (value, _) in values.items()}
        nimg = max((nimg for _, nimg in values.values()), default=0)
        self._run.log(found | {f"final/{name}": word for name, word in status.items()}, step=nimg)

    def close(self, status: str) -> None:
        """See :class:`Sink`."""
        self._run.finish()
