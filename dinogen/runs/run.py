"""The folder of a run as an object: its config, its stages, and what their files say.

It only reads files and does not import torch, so reports, status commands and notebooks can use it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dinogen.config import Config, ConfigError, StageConfig, load_config
from dinogen.config.base import read_mapping
from dinogen.files import named_folder
from dinogen.hub import refuse_code
from dinogen.runs.files import (
    Found,
    Line,
    read_evaluation,
    read_health,
    read_lines,
    read_metrics,
    read_result,
    read_state,
    read_visualizations,
    stage_folders,
)
from dinogen.runs.fingerprint import alike_id
from dinogen.runs.layout import (
    CHECKPOINTS,
    CONFIG,
    EVALUATION,
    HEALTH,
    LOCK,
    METRICS,
    PAGE,
    PROJECTIONS,
    RESULT,
    SAMPLES,
    SENT,
    STATE,
    STATS,
    STUDY,
    SWEEP,
    TABLE,
    TENSORBOARD,
    VIDEOS,
    VISUALIZATIONS,
    VISUALIZATIONS_INDEX,
    checkpoint_name,
    checkpoint_nimg,
    stage_name,
)
from dinogen.runs.values import Kind, existing


class Run:
    """The folder of a run: ``RUN/config.yaml``, ``RUN/64x64/...``, ``RUN/index.html``.

    Nothing is read on construction, and the folder need not exist. Files are read again on every
    access, because the run may still be training; the config is read once.

    ```python
    run = dinogen.Run("runs/first")
    for stage in run.stages:
        print(stage.name, stage.status, stage.progress)
    stage = run.stage(64)
    stage.result["seconds"], stage.metric("fid"), stage.checkpoints.nimg
    ```

    Args:
        path: the folder, which may have been copied or moved.
        places: ``KEY=VALUE`` changes to the config, such as the current location of the data
            (``data.path=/mnt/faces``).

    Attributes:
        path: the folder, as a path that ends in its name.
    """

    def __init__(self, path: Path | str, places: Sequence[str] = ()) -> None:
        self.path = named_folder(Path(path))
        self._places = tuple(places)
        self._config: Config | None = None

    @classmethod
    def of(cls, config: Config) -> Run:
        """The run of a given config; the run need not have begun.

        Args:
            config: its ``run`` is the folder; it is used instead of the folder's own config.
        """
        run = cls(config.run)
        run._config = config
        return run

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"

    @property
    def config(self) -> Config:
        """The config; its ``run`` is this folder, even if the file names another.

        Raises:
            ConfigError: the folder holds no config.yaml, or one that cannot be used.
        """
        if self._config is None:
            if not self.has_config:
                raise ConfigError(
                    f"{self.path}: no run here ({CONFIG} is missing): give the folder of a run"
                )
            refuse_code(read_mapping(self.config_file), self.config_file)
            config = load_config(self.config_file, self._places)
            self._config = config.model_copy(update={"run": self.path})
        return self._config

    @property
    def config_file(self) -> Path:
        """``RUN/config.yaml``, written when the run begins."""
        return self.path / CONFIG

    @property
    def has_config(self) -> bool:
        """Whether there is a config.yaml in the folder."""
        return self.config_file.is_file()

    @property
    def page(self) -> Path:
        """``RUN/index.html``, written when a stage ends."""
        return self.path / PAGE

    @property
    def lock_file(self) -> Path:
        """``RUN/.lock``, locked by the process that trains in the folder."""
        return self.path / LOCK

    @property
    def samples_folder(self) -> Path:
        """``RUN/samples``, where ``dinogen sample`` writes by default."""
        return self.path / SAMPLES

    @property
    def projections_folder(self) -> Path:
        """``RUN/projections``, where ``dinogen project`` writes by default."""
        return self.path / PROJECTIONS

    @property
    def videos_folder(self) -> Path:
        """``RUN/videos``, where ``dinogen video`` writes by default."""
        return self.path / VIDEOS

    @property
    def table_file(self) -> Path:
        """``RUN/stats.csv``, of ``logging: [csv]``: the lines of all stages as one table."""
        return self.path / TABLE

    @property
    def sent_folder(self) -> Path:
        """``RUN/logging``: how far the run was sent to W&B, MLflow or Trackio."""
        return self.path / SENT

    @property
    def study(self) -> Path | None:
        """The folder of the study that the run belongs to, two levels above it; None without."""
        found = self.path.absolute().parent.parent
        return found if (found / STUDY).is_file() else None

    def stage(self, resolution: int) -> Stage:
        """The stage of a resolution, whether or not it has begun, or is in the config."""
        return Stage(self, resolution)

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The stages of the config and those that have begun, by resolution.

        Raises:
            ConfigError: see :attr:`config`.
        """
        sizes = {stage.resolution for stage in (*self.planned, *self.begun)}
        return tuple(self.stage(size) for size in sorted(sizes))

    @property
    def planned(self) -> tuple[Stage, ...]:
        """The stages of the config, in its order.

        Raises:
            ConfigError: see :attr:`config`.
        """
        return tuple(self.stage(one.resolution) for one in self.config.stages)

    @property
    def begun(self) -> tuple[Stage, ...]:
        """The stages that have a folder, by resolution; needs no config."""
        return tuple(self.read_stages().value)

    def read_stages(self) -> Found[list[Stage]]:
        """The stages that have a folder, by resolution; and why the run's cannot be listed."""
        found = stage_folders(self.path)
        stages = [self.stage(resolution) for resolution, _ in found.value]
        return Found(found.path, stages, found.problems, found.there)

    @property
    def last_done(self) -> Stage | None:
        """The largest stage of the config that is done; None if there is none.

        Raises:
            ConfigError: see :attr:`config`.
        """
        return next((stage for stage in reversed(self.planned) if stage.done), None)

    @property
    def status(self) -> str:
        """``done`` if all stages of the config are, ``begun`` or ``not begun``.

        Raises:
            ConfigError: see :attr:`config`.
        """
        words = {stage.status for stage in self.planned}
        if words == {"done"}:
            return "done"
        return "not begun" if words == {"not begun"} else "begun"

    def length_of(self, stage: StageConfig) -> int | None:
        """Number of images of one stage.

        None if the stage's length is given in epochs and the run has not begun: only then is the
        number of images known and written to the run's config.
        """
        if stage.kimg is not None:
            return stage.num_images
        try:
            # read again: self._config may be the user's, or older than the run
            written = load_config(self.config_file).stages
        except ConfigError:
            return None
        same = (one for one in written if one.resolution == stage.resolution)
        found = next((one for one in same if one.epochs == stage.epochs), None)
        return None if found is None or found.kimg is None else found.num_images


@dataclass(frozen=True)
class Stage:
    """One stage of a run: ``RUN/64x64``, which need not have begun.

    A property returns the valid part of a file, and an empty value if the file is missing or
    damaged; the method ``read_...`` of the same file also reports what is wrong with it. None of
    them raises because of a file's content.

    Attributes:
        run: the run it belongs to.
        resolution: side of its images in pixels.
    """

    run: Run
    resolution: int

    @property
    def name(self) -> str:
        """Name of its folder: ``64x64``."""
        return stage_name(self.resolution)

    @property
    def folder(self) -> Path:
        """``RUN/64x64``."""
        return self.run.path / self.name

    @property
    def config(self) -> StageConfig:
        """Its section of the run's config.

        Raises:
            ConfigError: the config cannot be used, or has no such stage.
        """
        stages = {stage.resolution: stage for stage in self.run.config.stages}
        if self.resolution not in stages:
            raise ConfigError(
                f"stage {self.resolution} is not in the config: stages are {list(stages)}"
            )
        return stages[self.resolution]

    # ---- files and folders -----------------------------------------------------------------------

    @property
    def checkpoints(self) -> Checkpoints:
        """``RUN/64x64/checkpoints``."""
        return Checkpoints(self.folder / CHECKPOINTS)

    @property
    def stats_file(self) -> Path:
        """``stats.jsonl``: a line of numbers per log interval."""
        return self.folder / STATS

    @property
    def result_file(self) -> Path:
        """``result.json``: the stage's results, written at its end."""
        return self.folder / RESULT

    @property
    def metrics_file(self) -> Path:
        """``metrics.jsonl``: metric values of generated images, measured during training."""
        return self.folder / METRICS

    @property
    def health_file(self) -> Path:
        """``health.jsonl``: each change of the health status, with its warnings."""
        return self.folder / HEALTH

    @property
    def evaluation_file(self) -> Path:
        """``evaluation.json``, of ``dinogen evaluate``."""
        return self.folder / EVALUATION

    @property
    def sweep_file(self) -> Path:
        """``checkpoints.jsonl``: metric values of kept checkpoints, measured after training."""
        return self.folder / SWEEP

    @property
    def visualizations_folder(self) -> Path:
        """``visualizations``, of ``dinogen look``."""
        return existing(self.folder, VISUALIZATIONS)

    @property
    def visualizations_index(self) -> Path:
        """``visualizations/visualizations.json``: what each image shows."""
        return existing(self.visualizations_folder, VISUALIZATIONS_INDEX)

    @property
    def samples_folder(self) -> Path:
        """``samples``: grids drawn during training, named by the images seen."""
        return self.folder / SAMPLES

    @property
    def tensorboard_folder(self) -> Path:
        """``tb``: the event files for TensorBoard."""
        return self.folder / TENSORBOARD

    # ---- contents --------------------------------------------------------------------------------

    @property
    def stats(self) -> list[Line]:
        """Lines of stats.jsonl in the order of ``nimg``: ``loss``, ``images_per_s`` and so on."""
        return self.read_stats().value

    @property
    def result(self) -> dict[str, Any] | None:
        """result.json: ``nimg``, ``seconds``, ``health``, ``files``; None before the first end.

        If the config was changed to a longer stage since, there is a result, but the stage is not
        :attr:`done`.
        """
        return self.read_result().value

    @property
    def health(self) -> list[Line]:
        """Lines of health.jsonl: ``status`` and ``warnings`` from ``nimg`` on."""
        return read_health(self.health_file).value

    @property
    def metrics(self) -> list[Line]:
        """Lines of metrics.jsonl: ``nimg``, and ``metrics`` by name."""
        return self.read_metrics().value

    @property
    def evaluation(self) -> dict[str, Any] | None:
        """evaluation.json: ``nimg``, and ``measured`` by name; None if there is no evaluation."""
        return self.read_evaluation().value

    @property
    def sweep(self) -> list[Line]:
        """Lines of checkpoints.jsonl: ``nimg`` of a kept checkpoint, and ``metrics`` by name."""
        return self.read_sweep().value

    @property
    def visualizations(self) -> dict[str, dict[str, Any]]:
        """visualizations.json: ``file``, ``caption``, ``nimg``, ``seed`` by name; can be empty."""
        return self.read_visualizations().value

    def read_stats(self, kinds: Mapping[str, Kind] | None = None) -> Found[list[Line]]:
        """stats.jsonl and what is wrong with it.

        Args:
            kinds: the expected kind of value, by key; see :func:`dinogen.runs.files.read_lines`.
        """
        return read_lines(self.stats_file, kinds)

    def read_result(self) -> Found[dict[str, Any] | None]:
        """result.json and what is wrong with it."""
        return read_result(self.result_file)

    def read_metrics(self) -> Found[list[Line]]:
        """metrics.jsonl and what is wrong with it."""
        return read_metrics(self.metrics_file)

    def read_evaluation(self) -> Found[dict[str, Any] | None]:
        """evaluation.json and what is wrong with it."""
        return read_evaluation(self.evaluation_file)

    def read_sweep(self) -> Found[list[Line]]:
        """checkpoints.jsonl and what is wrong with it."""
        return read_metrics(self.sweep_file)

    def read_visualizations(self) -> Found[dict[str, dict[str, Any]]]:
        """visualizations.json and what is wrong with it."""
        return read_visualizations(self.visualizations_index)

    # ---- progress --------------------------------------------------------------------------------

    @property
    def end(self) -> int | None:
        """Number of images that the run has seen at the end of this stage, earlier stages included.

        None while a length in epochs is not known in images: see :meth:`Run.length_of`.

        Raises:
            ConfigError: the run's config cannot be used, as for all that follow.
        """
        stages = [one for one in self.run.config.stages if one.resolution <= self.resolution]
        sizes = [self.run.length_of(stage) for stage in stages]
        known = [size for size in sizes if size is not None]
        return sum(known) if len(known) == len(sizes) else None

    @property
    def done(self) -> bool:
        """Whether it reached the length in the config, or ended early."""
        return self.done_result is not None

    @property
    def done_result(self) -> dict[str, Any] | None:
        """result.json of a stage that is :attr:`done`; None otherwise."""
        result = self.result
        if result is None or result.get("nimg") is None:
            return None
        if result.get("ended_early"):
            return result
        end = self.end
        return result if end is not None and result["nimg"] >= end else None

    @property
    def nimg(self) -> int | None:
        """Number of images seen at the newest log line; None before the first."""
        lines = self.stats
        return lines[-1]["nimg"] if lines else None

    @property
    def status(self) -> str:
        """``not begun``, ``begun`` (it has a log line) or ``done``."""
        if self.done:
            return "done"
        return "not begun" if self.nimg is None else "begun"

    @property
    def progress(self) -> str:
        """Progress in words; empty before the first log line."""
        result = self.done_result
        if result is not None:
            return f"{result['nimg'] / 1000:.4g} kimg, {result.get('health', 'unknown')}"
        nimg = self.nimg
        if nimg is None:
            return ""
        end = self.end
        return f"{nimg / 1000:.4g} of {'?' if end is None else f'{end / 1000:.4g}'} kimg"

    @property
    def evaluated(self) -> bool:
        """Whether it is done and was evaluated at its end."""
        return self._evaluation_at_end() is not None

    @property
    def visualized(self) -> bool:
        """Whether it is done and ``dinogen look`` has drawn its end."""
        result = self.done_result
        return result is not None and any(
            one.get("nimg") == result["nimg"] for one in self.visualizations.values()
        )

    def metric(self, name: str) -> dict[str, Any] | None:
        """The value of a metric at the end of the stage, as in evaluation.json.

        Returns:
            ``value``, ``spread``, ``better``, ``fingerprint``, ...; ``value`` is None where the
            metric is not available, and ``reason`` says why. ``alike`` is added, the same for
            values that can be compared. None if the metric was not measured.
        """
        evaluation = self._evaluation_at_end() or {}
        found: dict[str, Any] | None = (evaluation.get("measured") or {}).get(name)
        if found is None:
            return None
        known = evaluation.get("fingerprints") or {}
        return found | {"alike": alike_id(found.get("fingerprint"), known)}

    def _evaluation_at_end(self) -> dict[str, Any] | None:
        """evaluation.json of a stage that is done, if it was evaluated at its end."""
        result, measured = self.done_result, self.evaluation
        if result is None or measured is None or measured.get("nimg") != result["nimg"]:
            return None
        return measured


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of a stage, found by folder name; loading one verifies that it is complete.

    Attributes:
        folder: ``RUN/64x64/checkpoints``, which need not exist.
    """

    folder: Path

    @property
    def folders(self) -> list[Path]:
        """Folders of the checkpoints, oldest first, without the temporary ones of a killed save."""
        if not self.folder.is_dir():
            return []
        found = [
            (nimg, path)
            for path in self.folder.iterdir()
            if (nimg := checkpoint_nimg(path.name)) is not None and path.is_dir()
        ]
        return [path for _, path in sorted(found)]

    @property
    def nimg(self) -> list[int]:
        """Number of images seen at each, oldest first."""
        return [int(path.name) for path in self.folders]

    @property
    def newest(self) -> Path | None:
        """Folder of the newest; None if there is none."""
        folders = self.folders
        return folders[-1] if folders else None

    def at(self, nimg: int) -> Path:
        """Folder of the checkpoint at ``nimg`` images, which need not exist."""
        return self.folder / checkpoint_name(nimg)

    def iter_states(self) -> Iterator[Found[dict[str, Any] | None]]:
        """state.json of each, newest first: the run's progress, and its training data."""
        for path in reversed(self.folders):
            yield read_state(path / STATE)
