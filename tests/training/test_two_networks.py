"""Two trained networks, lazy regularisers, accumulation and a switch of what trains: every engine
on two ranks ends with the weights and optimizer state of plain torch in one process."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dinogen.config import parse_config
from tests.forked import torchrun
from tests.training.two_networks import (
    BATCH,
    HALF,
    NUM_STEPS,
    SWITCH,
    Training,
    TwoNetworks,
    file_name,
    rate,
    run,
    share,
)

SCRIPT = Path(__file__).with_name("two_networks.py")
ENGINES = ("ddp:1", "deepspeed:0", "deepspeed:1", "deepspeed:2")
# batch norm sees one microbatch at a time, so it fits whole batches alone
SHAPES = ("null:batch", "null:none", "2:none", "1:none")
CASES = [f"{engine}:{shape}" for engine in ENGINES for shape in SHAPES]
# resumed before what trains has changed, and after
RESUMED = [f"{engine}:2:none@{step}" for engine in ENGINES for step in (SWITCH - 1, HALF)]
ELASTIC = [f"{engine}:2:none<half.safetensors" for engine in ENGINES]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> Path:
    """What every engine ends with on two ranks: one start for all, as imports take long."""
    out = tmp_path_factory.mktemp("ranks")
    one = Training("single:1:2:none")
    one.steps(0, HALF)
    save_file(one.state(), out / "half.safetensors")
    done = torchrun(2, SCRIPT, out, *CASES, *RESUMED, *ELASTIC)
    assert done.returncode == 0, done.stderr[-6000:]
    return out


def plain_torch(norm: str) -> dict[str, torch.Tensor]:
    """The same training by hand: no engine, whole batches, one optimizer per network."""
    family = TwoNetworks(parse_config({}, ["stages=[{resolution: 4, kimg: 1}]"]), norm)
    optimizers, full = {}, {}
    for name, network in family.networks.items():
        c = family.optimizer_scale(name)
        betas = (0.9**c, 0.99**c)
        optimizers[name] = torch.optim.Adam(network.parameters(), lr=0.01 * c, betas=betas)
        full[name] = 0.01 * c
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
            for group in optimizers[phase.network].param_groups:
                group["lr"] = full[phase.network] * rate(step)
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
    found = load_file(two_ranks / file_name(case))
    assert_close(found, plain_torch(case.rpartition(":")[2]))


@pytest.mark.parametrize("case", RESUMED)
def test_resumed_on_as_many_ranks_it_ends_bitwise_the_same(two_ranks, case):
    resumed = load_file(two_ranks / file_name(case))
    whole = load_file(two_ranks / file_name(case.partition("@")[0]))
    assert resumed.keys() == whole.keys()
    assert [name for name in whole if not torch.equal(whole[name], resumed[name])] == []


@pytest.mark.parametrize("case", ELASTIC)
def test_what_one_process_saved_goes_on_in_two_ranks(two_ranks, case):
    assert_close(load_file(two_ranks / file_name(case)), plain_torch("none"))


@pytest.mark.parametrize("engine", ENGINES)
def test_what_two_ranks_saved_goes_on_in_one_process(two_ranks, engine):
    training = Training("single:1:null:none")
    training.load(load_file(two_ranks / f"half-{engine.replace(':', '-')}.safetensors"))
    training.steps(HALF, NUM_STEPS)
    assert_close(training.state(), plain_torch("none"))


def test_the_toy_is_no_empty_one():
    assert BATCH % 2
    start = TwoNetworks(parse_config({}, ["stages=[{resolution: 4, kimg: 1}]"]), "none")
    end = plain_torch("none")
    for name, network in start.networks.items():
        for key, value in network.state_dict().items():
            assert not torch.allclose(value, end[f"{name}/{key}"], atol=1e-3), key
