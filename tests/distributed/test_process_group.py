"""Ranks under a real torchrun with gloo, a restart after a crash, and the world of one."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dinogen.distributed import process_group

REPO = Path(__file__).parents[2]

RANKS = """
import json, os, sys
from pathlib import Path
import torch
from dinogen.distributed import process_group as dist

out = Path(sys.argv[1])
before = [dist.rank(), dist.world_size()]
dist.init()
dist.init()
rank = dist.rank()
attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
if attempt == 0:
    # Keys of this attempt stay in the agent's store, and one rank dies amid a collective.
    dist.all_reduce_sum(torch.ones(1))
    if rank == 1:
        os._exit(3)
mine = torch.tensor([rank + 1.0, 10.0])
total = dist.all_reduce_sum(mine)
with dist.rank_zero_section() as main:
    assert main == (rank == 0)
result = {
    "attempt": attempt,
    "before": before,
    "after": [dist.rank(), dist.world_size()],
    "local": [dist.local_rank(), dist.local_world_size()],
    "main": dist.is_main(),
    "device": str(dist.device()),
    "sum": total.tolist(),
    "mine": mine.tolist(),
    "any": [dist.any_rank(rank == 1), dist.any_rank(False), dist.any_rank(True)],
    "object": dist.broadcast_object({"rank": rank, "name": "Zoë", "pair": (1, None)}),
    "empty": dist.broadcast_object(None),
}
(out / f"{rank}.json").write_text(json.dumps(result))
dist.shutdown()
dist.shutdown()
"""


def torchrun(script: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node=2", "--max-restarts=1", str(script), *arguments]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
    environment |= {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=280, check=False
    )


def test_two_ranks_agree_after_a_crash_and_a_restart(tmp_path):
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    done = torchrun(script, str(tmp_path))
    assert done.returncode == 0, done.stderr
    for rank in range(2):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == {
            "attempt": 1,
            "before": [rank, 2],
            "after": [rank, 2],
            "local": [rank, 2],
            "main": rank == 0,
            "device": "cpu",
            "sum": [3.0, 20.0],
            "mine": [rank + 1.0, 10.0],
            "any": [True, False, True],
            "object": {"rank": 0, "name": "Zoë", "pair": [1, None]},
            "empty": None,
        }


@pytest.fixture
def alone(monkeypatch):
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    for name in (*names, "SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_without_torchrun_it_is_a_world_of_one(alone):
    process_group.init()
    with process_group.rank_zero_section() as mine:
        assert mine
    assert (process_group.rank(), process_group.world_size(), process_group.local_rank()) == (
        0,
        1,
        0,
    )
    assert process_group.is_main() and not torch.distributed.is_initialized()
    tensor = torch.tensor([1, 2])
    total = process_group.all_reduce_sum(tensor)
    assert total.tolist() == [1, 2] and total.data_ptr() != tensor.data_ptr()
    assert process_group.any_rank(True) and not process_group.any_rank(False)
    assert process_group.broadcast_object({"pair": (1, 2)}) == {"pair": [1, 2]}
    process_group.shutdown()


def test_what_is_no_json_is_not_sent(alone):
    with pytest.raises(TypeError):
        process_group.broadcast_object({"path": Path()})


def test_srun_without_torchrun_is_refused(alone):
    alone.setenv("SLURM_STEP_NUM_TASKS", "4")
    with pytest.raises(process_group.DistError, match=r"srun started 4 tasks .* torchrun"):
        process_group.init()


@pytest.mark.parametrize("name", ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE"])
def test_mpirun_without_torchrun_is_refused(alone, name):
    alone.setenv(name, "2")
    with pytest.raises(
        process_group.DistError, match=f"mpirun started 2 tasks .*{name}=2.* torchrun"
    ):
        process_group.init()


def test_a_job_script_of_several_tasks_may_run_one_process(alone):
    """What sbatch sets in the script itself; it is not srun that started this process."""
    alone.setenv("SLURM_NTASKS", "2")
    alone.setenv("SLURM_PROCID", "0")
    process_group.init()
    assert process_group.world_size() == 1


def test_a_world_without_ranks_is_refused_and_slurm_named(alone):
    alone.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        process_group.DistError, match=r"RANK is not set, so .* it is: start with torchrun"
    ):
        process_group.init()
    alone.setenv("SLURM_PROCID", "1")
    with pytest.raises(
        process_group.DistError, match=r"task 1 of a SLURM job; srun without torchrun"
    ):
        process_group.init()


def test_a_variable_that_is_no_number_is_named(alone):
    alone.setenv("RANK", "zero")
    with pytest.raises(process_group.DistError, match="RANK is 'zero' in the environment"):
        process_group.rank()


def test_a_world_without_an_address_is_refused(alone):
    alone.setenv("WORLD_SIZE", "2")
    alone.setenv("RANK", "0")
    alone.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(
        process_group.DistError, match="MASTER_ADDR is not set: start with torchrun"
    ):
        process_group.init()


@pytest.mark.parametrize(
    ("agent", "num_local", "address"),
    [("False", 2, "127.0.0.1"), ("True", 2, "far"), ("False", 1, "far")],
)
def test_a_store_is_looked_for_here_only_if_it_is_here(alone, agent, num_local, address):
    """torchrun's agent may use the store of another machine's; other nodes' ranks are not here."""
    for name, value in {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": num_local, "RANK": "1"}.items():
        alone.setenv(name, str(value))
    alone.setenv("MASTER_ADDR", "far")
    alone.setenv("MASTER_PORT", "1")
    alone.setenv("TORCHELASTIC_USE_AGENT_STORE", agent)
    asked = []
    alone.setattr(process_group.td, "TCPStore", lambda host, *args, **more: asked.append(host))
    alone.setattr(process_group.td, "PrefixStore", lambda prefix, store: store)
    process_group._store()
    assert asked == [address]


def test_the_name_of_this_machine_needs_no_dns(alone, caplog):
    """An agent's store at our own name, which nothing resolves, is on the loopback address."""
    for name, value in {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "RANK": "1"}.items():
        alone.setenv(name, value)
    alone.setenv("MASTER_PORT", "1")
    alone.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    asked = []
    alone.setattr(process_group.td, "TCPStore", lambda host, *args, **more: asked.append(host))
    alone.setattr(process_group.td, "PrefixStore", lambda prefix, store: store)

    def unknown(host, port):
        raise socket.gaierror(-2, "Name or service not known")

    alone.setattr(socket, "getaddrinfo", unknown)
    alone.setattr(socket, "gethostname", lambda: "nowhere.invalid")
    alone.setattr(socket, "getfqdn", lambda: "nowhere.invalid")
    for address in ("nowhere.invalid", "elsewhere.invalid"):
        alone.setenv("MASTER_ADDR", address)
        with caplog.at_level("INFO", "dinogen"):
            process_group._store()
    alone.setattr(socket, "getaddrinfo", lambda host, port: ["there"])
    alone.setenv("MASTER_ADDR", "nowhere.invalid")
    process_group._store()
    assert asked == ["127.0.0.1", "elsewhere.invalid", "nowhere.invalid"]
    (said,) = [one for one in caplog.messages if "loopback" in one]
    assert "nowhere.invalid" in said


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({}, False),
        ({"SLURM_JOB_ID": "5", "SLURM_NTASKS": "4"}, False),  # the shell of salloc
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, False),  # the script of sbatch
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "4"}, False),
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "4"}, True),
        ({"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4"}, True),
        ({"SLURM_PROCID": "3", "TORCHELASTIC_RUN_ID": "x"}, False),
    ],
)
def test_srun_is_named_only_where_it_started_several(alone, variables, named):
    for name in ("TORCHELASTIC_RUN_ID", "SLURM_STEP_NUM_TASKS", "SLURM_JOB_ID"):
        alone.delenv(name, raising=False)
    for name, value in variables.items():
        alone.setenv(name, value)
    assert ("srun" in process_group.started_by_slurm()) == named


@pytest.mark.parametrize(("num_local", "expected"), [("1", 6), ("4", 1), ("9", 1)])
def test_cores_are_shared_among_local_ranks(alone, num_local, expected):
    chosen = []
    alone.delenv("OMP_NUM_THREADS", raising=False)
    alone.setenv("LOCAL_WORLD_SIZE", num_local)
    alone.setattr(os, "sched_getaffinity", lambda pid: set(range(6)), raising=False)
    alone.setattr(torch, "set_num_threads", chosen.append)
    process_group.set_cpu_threads()
    assert chosen == [expected]


def test_the_users_number_of_threads_wins(alone):
    alone.setenv("OMP_NUM_THREADS", "3")
    alone.setattr(torch, "set_num_threads", lambda number: pytest.fail("changed"))
    process_group.set_cpu_threads()


def test_the_device_can_be_chosen(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    found = {}
    for name in ("cpu", "cuda", "mps", "auto"):
        process_group.use_device(name)
        found[name] = process_group.device().type
    assert found == {"cpu": "cpu", "cuda": "cuda", "mps": "mps", "auto": "cuda"}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert process_group.device().type == "mps"
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert process_group.device().type == "cpu"


@pytest.mark.parametrize("name", ["cuda", "mps"])
def test_a_device_that_is_not_there_is_said(name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(process_group.DistError, match=f"device: {name} is not available"):
        process_group.use_device(name)
