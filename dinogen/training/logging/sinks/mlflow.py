"""MLflow: one run per dinogen run, on a server, in a database or in a folder."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image
from pydantic import Field

from dinogen.config import Section
from dinogen.runs.values import finite
from dinogen.training.logging.sinks.base import Event, SentSink, group_of
from dinogen.training.logging.sinks.summary import flat

# The last metric of an event: where it is, the whole event is.
MARKER = "nimg"
_STATUS = {"done": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
_LONGEST = 500  # characters of a parameter, which every version takes
_MOST = 100  # parameters in one request


class MlflowOptions(Section):
    """``logging: [{mlflow: {...}}]``; what is left out, MLflow's own variables and defaults say."""

    tracking_uri: str | None = Field(
        None, description="server, database or folder; default: MLFLOW_TRACKING_URI, or mlflow.db"
    )
    experiment: str | None = Field(
        None, description="default: MLFLOW_EXPERIMENT_NAME, the study's name, or dinogen"
    )
    name: str | None = Field(None, description="name of the run; default: that of its folder")
    tags: dict[str, str] = Field({}, description="tags of the run")


class MlflowSink(SentSink):
    """Metrics by step (images seen), sample grids, parameters, the config as a file, and tags."""

    Options = MlflowOptions
    package = "mlflow"
    options: MlflowOptions

    def open(self) -> int | None:
        """See :class:`SentSink`; MLflow itself says how far it is."""
        # Another attempt is made later anyway.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
        import mlflow
        from mlflow.entities import Metric, Param
        from mlflow.exceptions import MlflowException

        self._metric, self._param = Metric, Param
        uri = self.options.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
        if not uri:
            # The default depends on the current folder, which the next process may not start in.
            uri = self.record.setdefault("tracking_uri", mlflow.get_tracking_uri())
        if "://" not in uri and uri != "databricks":
            uri = str(Path(uri.removeprefix("file:")).absolute())
        if uri.startswith(("/", "file:")):
            # MLflow refuses folders unless this is set; the user has named one.
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        self._client = mlflow.MlflowClient(uri)
        known = self.record.get("id")
        self._doubtful = known is not None
        if known is not None:
            try:
                self._client.get_run(known)
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
                known = None
        if known is None:
            known = self._create()
        self._id: str = known
        self.address = f"run {known} at {uri}"
        self._client.update_run(known, status="RUNNING")
        self._configure()
        steps = [one.step for one in self._client.get_metric_history(known, MARKER)]
        return max(steps, default=-1)

    def _create(self) -> str:
        name = self.options.experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME")
        name = name or group_of(self.run) or "dinogen"
        found = self._client.get_experiment_by_name(name)
        experiment = found.experiment_id if found else self._client.create_experiment(name)
        tags = {"dinogen.run": str(self.run.path.absolute())} | self.options.tags
        run_name = self.options.name or self.run.path.name
        known: str = self._client.create_run(experiment, run_name=run_name, tags=tags).info.run_id
        self.record["id"] = known
        return known

    def _configure(self) -> None:
        """Parameters cannot be changed: those that a resumed run changes are in config.yaml."""
        given = dict(flat("", self.run.config.model_dump(mode="json")))
        there = self._client.get_run(self._id).data.params
        new = [
            self._param(name, str(value)[:_LONGEST])
            for name, value in given.items()
            if name not in there and str(value)
        ]
        for begin in range(0, len(new), _MOST):
            self._client.log_batch(self._id, params=new[begin : begin + _MOST])
        self._client.log_artifact(self._id, str(self.run.config_file))

    def write(self, event: Event) -> None:
        """See :class:`SentSink`."""
        for name, path in event.images.items():
            if not (self._doubtful and self._has_image(name, event.nimg)):
                pixels = np.asarray(Image.open(path).convert("RGB"))
                self._client.log_image(self._id, pixels, key=name, step=event.nimg)
        if event.health is not None:
            self._client.set_tag(self._id, "health", event.health)
        if event.warnings:
            self._client.set_tag(self._id, f"warnings.{event.nimg}", "\n".join(event.warnings))
        given = {**event.values, "stage": event.stage}
        values = [
            (name, value)
            for name, one in given.items()
            if (value := finite(one)) is not None and not self._has(name, event.nimg)
        ]
        self._log([*values, (MARKER, float(event.nimg))], event.nimg)
        # Only what a killed process had begun can be there in part.
        self._doubtful = False

    def _log(self, values: list[tuple[str, float]], nimg: int) -> None:
        now = int(time.time() * 1000)
        metrics = [self._metric(name, value, now, nimg) for name, value in values]
        self._client.log_batch(self._id, metrics=metrics)

    def _has(self, name: str, nimg: int) -> bool:
        if not self._doubtful:
            return False
        return any(one.step == nimg for one in self._client.get_metric_history(self._id, name))

    def _has_image(self, name: str, nimg: int) -> bool:
        files = [str(one.path) for one in self._client.list_artifacts(self._id, "images")]
        return any(file.startswith(f"images/{name}+step+{nimg}+") for file in files)

    def flush(self) -> None:
        """Nothing waits: each request has been answered."""

    def summarize(self, values: Mapping[str, tuple[float, int]], status: Mapping[str, str]) -> None:
        """See :class:`SentSink`."""
        for name, (value, nimg) in values.items():
            self._log([(f"final/{name}", value)], nimg)
        for name, word in status.items():
            self._client.set_tag(self._id, name, word)

    def close(self, status: str) -> None:
        """See :class:`Sink`."""
        self._client.set_terminated(self._id, _STATUS[status])
