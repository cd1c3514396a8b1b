"""What stages and steps ask a cluster for: GPUs, processes, and flags of sbatch."""

from __future__ import annotations

import re

import pytest

from dinogen.config import ConfigError, parse_config
from launch.slurm.plan import stage_resources, step_resources


def make_config(**cluster):
    sizes = (4, 8, 16, 32, 64, 128, 256)
    stages = [{"resolution": size, "kimg": 10} for size in sizes]
    return parse_config({"stages": stages, "cluster": cluster})


def asked(config):
    found = [stage_resources(config, stage) for stage in config.stages]
    return [(one.nodes, one.gpus, one.processes) for one in found]


def test_small_stages_take_one_gpu_and_large_ones_many():
    config = make_config(nodes=4, gpus_per_node=8)
    one = (1, 1, 1)
    assert asked(config) == [one, one, one, one, (1, 4, 4), (2, 8, 8), (4, 8, 8)]
    assert asked(make_config()) == [one] * 7


def test_never_more_ranks_than_images_in_a_batch():
    config = make_config(nodes=32, gpus_per_node=8)
    assert asked(config)[-1] == (8, 8, 8)  # batch 64


def test_a_cluster_without_gpus_gets_processes():
    config = make_config(nodes=2, gpus_per_node=0, processes_per_node=2, cpus_per_process=3)
    assert asked(config)[-1] == (2, 0, 2)
    flags = stage_resources(config, config.stages[-1]).flags
    assert "--cpus-per-task=6" in flags
    assert not [flag for flag in flags if "gpu" in flag]
    for step in ("faces", "pyramids", "pack", "evaluate"):
        assert not [flag for flag in step_resources(config, step).flags if "gpu" in flag]


def test_steps_and_stages_may_ask_for_something_else():
    config = make_config(
        nodes=2,
        gpus_per_node=8,
        gpu_type="h100",
        partition="gpu",
        account="me",
        qos="high",
        constraint="nvlink",
        sbatch=["--exclusive"],
        pack={"partition": "cpu", "mem": "16G", "sbatch": []},
        stages=[{"resolution": 256, "nodes": 6, "time": "2-00:00:00"}],
    )
    flags = stage_resources(config, config.stages[-1]).flags
    assert {
        "--nodes=6",
        "--gpus-per-node=h100:8",
        "--time=2-00:00:00",
        "--partition=gpu",
        "--account=me",
        "--qos=high",
        "--constraint=nvlink",
        "--exclusive",
    } <= set(flags)
    pack = step_resources(config, "pack").flags
    assert {"--partition=cpu", "--mem=16G", "--nodes=1", "--account=me"} <= set(pack)
    assert not {"--exclusive"} & set(pack) and not [flag for flag in pack if "gpu" in flag]
    assert "--gpus-per-node=h100:1" in step_resources(config, "faces").flags
    assert "--gpus-per-node=h100:8" in step_resources(config, "pyramids").flags


@pytest.mark.parametrize(
    ("cluster", "words"),
    [
        ({"time": 43200}, "in quotes"),
        ({"time": "soon"}, "'soon' is not a time"),
        ({"nodes": 0}, "cluster.nodes"),
        ({"partitoin": "gpu"}, "did you mean 'partition'"),
        ({"stages": [{"resolution": 8}, {"resolution": 8}]}, "resolution 8 occurs twice"),
    ],
)
def test_mistakes_in_the_section_are_named(cluster, words):
    with pytest.raises(ConfigError, match=re.escape(words)):
        make_config(**cluster)
