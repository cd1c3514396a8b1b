"""Two trained networks, lazy regularisers, accumulation and a switch of what trains: every engine
on two ranks ends with the weights and optimizer state of plain torch in one process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dinogen.config import parse_config
from tests.training.two_networks import BATCH, NUM_STEPS, SWITCH, TwoNetworks, run, share

SCRIPT = Path(__file__).with_name("two_networks.py")
REPO = Path(__file__).parents[2]
ENGINES = ("ddp:1", "deepspeed:0", "deepspeed:1", "deepspeed:2")
# batch norm sees one microbatch at a time, so it fits whole batches alone
SHAPES = ("null:batch", "null:none", "2:none", "1:none")
CASES = [f"{engine}:{shape}" for engine in ENGINES for shape in SHAPES]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> Path:
    """What every engine ends with on two ranks: one start for all, as imports take long."""
    out = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node=2", str(SCRIPT), str(out), *CASES]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-6000:]
    return out


def plain_torch(norm: str) -> dict[str, torch.Tensor]:
    """The same training by hand: no engine, whole batches, one optimizer per network."""
    family = TwoNetworks(parse_config({}, ["stages=[{resolution: 4, kimg: 1}]"]), norm)
    optimizers = {
        name: torch.optim.Adam(network.parameters(), lr=0.01, betas=(0.9, 0.99))
        for name, network in family.networks.items()
    }
    for step in range(NUM_STEPS):
        family.fading = step < SWITCH
        batch = share(step)
        for phase in family.phases:
            if step % phase.every:
                continue
            for name, network in family.networks.items():
                names = family.trainable(name) if name == phase.network else set()
                for key, parameter in network.named_parameters():
                    parameter.requires_grad_(key in names)
            losses, _ = phase.losses(batch)
            sum(losses.values()).backward()
            trained = [p for p in family.networks[phase.network].parameters() if p.requires_grad]
            torch.nn.utils.clip_grad_norm_(trained, 0.5)
            optimizers[phase.network].step()
            optimizers[phase.network].zero_grad()
    found = {}
    for name, network in family.networks.items():
        found |= {f"{name}/{key}": value for key, value in network.state_dict().items()}
        for key, parameter in network.named_parameters():
            for what, value in optimizers[name].state[parameter].items():
                found[f"{name}/{key}/{what}"] = value
    return found


def assert_close(a, b):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=2e-6, msg=lambda m: name + m)  # noqa: B023


@pytest.mark.parametrize("shape", ["null:batch", "null:none", "2:none"])
def test_one_process_equals_plain_torch(shape):
    assert_close(run(f"single:1:{shape}"), plain_torch(shape.partition(":")[2]))


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_equal_plain_torch(two_ranks, case):
    found = load_file(two_ranks / f"{case.replace(':', '-')}.safetensors")
    assert_close(found, plain_torch(case.rpartition(":")[2]))


def test_the_toy_is_no_empty_one():
    assert BATCH % 2
    start = TwoNetworks(parse_config({}, ["stages=[{resolution: 4, kimg: 1}]"]), "none")
    end = plain_torch("none")
    for name, network in start.networks.items():
        for key, value in network.state_dict().items():
            assert not torch.allclose(value, end[f"{name}/{key}"], atol=1e-3), key
