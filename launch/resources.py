"""What the SLURM job of each step asks for: the config's cluster section, per step."""

from __future__ import annotations

from dataclasses import dataclass

from dinogen.config import Config, StageConfig
from dinogen.config_cluster import ClusterConfig, JobConfig

# From this resolution on a stage takes more than one GPU, four times as many for each doubling,
# just as its pictures have four times the pixels.
_ONE_GPU = 32


@dataclass(frozen=True)
class Resources:
    """What sbatch is asked for.

    Attributes:
        nodes: number of nodes.
        gpus: GPUs on each of them.
        processes: processes on each of them.
        flags: all of it as flags of sbatch.
    """

    nodes: int
    gpus: int
    processes: int
    flags: tuple[str, ...]


def stage_resources(config: Config, stage: StageConfig) -> Resources:
    """Resources of one stage.

    One GPU up to 32x32, then four times as many for each doubling (64: 4, 128: 16, 256: 64), up to
    ``cluster.nodes`` full nodes and never more than there are pictures in a batch. Without GPUs
    the same holds for processes. A stage whose nodes the config names takes them whole.
    """
    cluster = config.cluster
    own = next((job for job in cluster.stages if job.resolution == stage.resolution), JobConfig())
    per_node = cluster.processes_per_node or cluster.gpus_per_node or 1
    wanted = max(1, stage.resolution // _ONE_GPU) ** 2
    most = min(wanted, cluster.nodes * per_node, stage.batch)
    processes = per_node if own.nodes else min(most, per_node)
    return _resources(cluster, own, nodes=max(1, most // per_node), processes=processes)


def step_resources(config: Config, step: str) -> Resources:
    """Resources of a step that is no stage: faces, pyramids, pack or evaluate."""
    cluster = config.cluster
    own: JobConfig = getattr(cluster, step)
    if step == "pack":
        own = own.model_copy(update={"gpus_per_node": own.gpus_per_node or 0})
    per_node = cluster.processes_per_node or cluster.gpus_per_node or 1
    processes = 1 if step in ("faces", "pack") else per_node
    return _resources(cluster, own, nodes=1, processes=processes)


def _resources(cluster: ClusterConfig, own: JobConfig, nodes: int, processes: int) -> Resources:
    """Join the defaults of a step with what the config says of it."""
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
