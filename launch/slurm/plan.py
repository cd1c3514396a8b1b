"""The steps of a run on a cluster, from photos to metrics: script, arguments, resources."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path

from dinogen.config import Config, StageConfig
from dinogen.config.training import ClusterConfig, JobConfig
from dinogen.errors import UserError
from dinogen.runs.run import Run
from launch.request import choose_stages
from shards.format.manifest import MANIFEST

log = logging.getLogger(__name__)

# A link to slurm/ in a clone, a copy of it in a wheel.
SCRIPTS = Path(__file__).with_name("scripts").resolve()


@dataclass(frozen=True)
class Step:
    """One job of the chain.

    Attributes:
        name: ``faces``, ``pyramids``, ``pack``, ``train-8``, ``evaluate``.
        script: one of the scripts in slurm/.
        args: its arguments.
        resources: what the job requests.
        done: whether its results exist.
    """

    name: str
    script: Path
    args: tuple[str, ...]
    resources: Resources
    done: bool = False


def plan_steps(
    config: Config,
    stages: str | None,
    photos: Path | None,
    file: Path,
    metric: str | None = None,
) -> list[Step]:
    """All steps of a run in order, including those that are done.

    Args:
        config: the whole run.
        stages: ``8``, ``4..64``, or None for all.
        photos: folder to make the data from, unless they are packed already.
        file: the config that the jobs read.
        metric: the evaluation is repeated until it has this metric, and is followed by
            visualizations; None for any evaluation.

    Raises:
        UserError: there are no data and no photos, or no such stage.
    """
    run, sizes = Run.of(config), choose_stages(config, stages)
    chosen = [stage for stage in config.stages if stage.resolution in sizes]
    steps = _data_steps(config, photos, file)
    for stage in chosen:
        size = str(stage.resolution)
        resources = stage_resources(config, stage)
        done = run.stage(stage.resolution).done
        steps.append(_step("train", (str(file), size), resources, done, f"train-{size}"))
    if not _has_held_out(config):
        log.info(
            "no evaluation: %s has no held-out data (prepare.pack.val_fraction)",
            config.data.location,
        )
        return steps
    last = run.stage(chosen[-1].resolution)
    args: tuple[str, ...] = (str(config.run), "--stage", str(last.resolution))
    resources = step_resources(config, "evaluate")
    if metric is None:
        return [*steps, _step("evaluate", args, resources, last.evaluated)]
    metric_value = last.metric(metric) or {}
    done = metric_value.get("value") is not None and last.visualized
    args += tuple(metric_changes(config))
    return [*steps, _step("results", args, resources, done, "evaluate")]


def metric_changes(config: Config) -> list[str]:
    """The section ``metrics:`` as KEY=VALUE for `dinogen evaluate`.

    Without them evaluate would use the section that was saved when the run was trained.
    """
    given = config.metrics.model_dump(mode="json", exclude_defaults=True)
    return [f"metrics.{key}={json.dumps(value)}" for key, value in given.items()]


def _has_held_out(config: Config) -> bool:
    """Whether the data have, or will have, held-out samples."""
    return any(_holds_back(config, path) for path in data_paths(config))


def _holds_back(config: Config, path: str) -> bool:
    if "://" in path:
        return True  # unknown until it is read
    try:
        text = (Path(path) / MANIFEST).read_text(encoding="utf-8")
        return "val" in json.loads(text)["splits"]
    except FileNotFoundError:
        return config.prepare.pack.val_fraction > 0
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return True  # the job will report what is wrong


def data_paths(config: Config) -> list[str]:
    """Folders or addresses of the run's data, several of a mix."""
    return [one.path for one in config.data.mix] or [config.data.path]


def lacking_data(config: Config) -> list[str]:
    """Folders of the run's data that are not packed yet."""
    paths = [path for path in data_paths(config) if "://" not in path]
    return [path for path in paths if not (Path(path) / MANIFEST).is_file()]


def _data_steps(config: Config, photos: Path | None, file: Path) -> list[Step]:
    """The steps from photos to shards; none if the data are packed."""
    lacking = lacking_data(config)
    if not lacking:
        if photos is not None:
            log.info(
                "--photos %s: not read, because %s is packed already: to add new photos, run "
                "dinogen prepare first; to make other data, give another data.path",
                photos,
                config.data.location,
            )
        return []
    data = lacking[0]
    if config.data.mix:
        raise UserError(
            f"data.mix: {data} holds no packed data: pack each part of the mix first (dinogen "
            "prepare, or launch a run on each)"
        )
    if photos is None:
        raise UserError(
            f"data.path: {data} holds no packed data: add --photos PHOTOS to make them, or pack "
            "them first (dinogen prepare)"
        )
    if not photos.is_dir():
        raise UserError(f"--photos {photos}: no such folder")
    from dinogen.training.data import makes_features  # imports torch, which status does not need

    faces, pyramids = f"{data.rstrip('/')}-faces", f"{data.rstrip('/')}-pyramids"
    given: dict[str, tuple[str, ...]] = {"faces": (str(photos), faces)}
    if makes_features(config):
        given |= {"pyramids": (faces, pyramids), "pack": (faces, pyramids, data)}
    else:
        given["pack"] = (faces, data)
    return [
        _step(name, (str(file), *args), step_resources(config, name))
        for name, args in given.items()
    ]


def _step(
    script: str, args: tuple[str, ...], resources: Resources, done: bool = False, name: str = ""
) -> Step:
    return Step(name or script, SCRIPTS / f"{script}.sbatch", args, resources, done)


# Above this resolution a stage takes more than one GPU: four times as many for each doubling, since
# its images have four times the pixels.
_ONE_GPU = 32


@dataclass(frozen=True)
class Resources:
    """What a job requests from SLURM.

    Attributes:
        nodes: number of nodes.
        gpus: GPUs on each of them.
        processes: processes on each of them.
        flags: the whole request as flags of sbatch.
    """

    nodes: int
    gpus: int
    processes: int
    flags: tuple[str, ...]


def stage_resources(config: Config, stage: StageConfig) -> Resources:
    """Resources of one stage.

    One GPU up to 32x32, then four times as many for each doubling (64: 4, 128: 16, 256: 64), up to
    ``cluster.nodes`` full nodes and never more than there are images in a batch. Without GPUs
    the same holds for processes. If the config sets the nodes of a stage, it uses all of each.
    """
    cluster = config.cluster
    own = next((job for job in cluster.stages if job.resolution == stage.resolution), JobConfig())
    per_node = cluster.processes_per_node or cluster.gpus_per_node or 1
    wanted = max(1, stage.resolution // _ONE_GPU) ** 2
    most = min(wanted, cluster.nodes * per_node, stage.batch)
    processes = per_node if own.nodes else min(most, per_node)
    return _resources(cluster, own, nodes=max(1, most // per_node), processes=processes)


def step_resources(config: Config, step: str) -> Resources:
    """Resources of a step that is not a stage: faces, pyramids, pack or evaluate."""
    cluster = config.cluster
    own: JobConfig = getattr(cluster, step)
    if step == "pack":
        own = own.model_copy(update={"gpus_per_node": own.gpus_per_node or 0})
    per_node = cluster.processes_per_node or cluster.gpus_per_node or 1
    processes = 1 if step in ("faces", "pack") else per_node
    return _resources(cluster, own, nodes=1, processes=processes)


def _resources(cluster: ClusterConfig, own: JobConfig, nodes: int, processes: int) -> Resources:
    """The defaults of a step, changed by what the config says about it."""
    nodes = own.nodes or nodes
    gpus = own.gpus_per_node
    if gpus is None:
        gpus = min(cluster.gpus_per_node, processes)
    processes = own.processes_per_node or own.gpus_per_node or processes
    cpus = own.cpus_per_process or cluster.cpus_per_process
    kind = f"{cluster.gpu_type}:" if cluster.gpu_type else ""
    named = {
        "nodes": nodes,
        "ntasks-per-node": 1,  # torchrun, which starts the processes
        "gpus-per-node": f"{kind}{gpus}" if gpus else None,
        "cpus-per-task": cpus * processes,
        "mem": own.mem or cluster.mem,
        "time": own.time or cluster.time,
        "partition": own.partition or cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "constraint": cluster.constraint,
    }
    flags = [f"--{name}={value}" for name, value in named.items() if value is not None]
    flags += cluster.sbatch if own.sbatch is None else own.sbatch
    return Resources(nodes, gpus, processes, tuple(flags))
