"""The single engine: accumulation, clipping and the guard, against plain torch."""

import copy
import platform
import subprocess
import sys

import pytest
import torch
from torch import nn

from dinogen.config import ConfigError, parse_config
from dinogen.families.base import Phase
from dinogen.training.engines import base as engine_module
from dinogen.training.engines import make_engine
from dinogen.training.engines.base import SingleEngine, resolve_precision

CPU = torch.device("cpu")


class Toy:
    """Two networks, G and D, both trained by a regression."""

    def __init__(self):
        torch.manual_seed(0)
        self.networks = {"G": nn.Linear(4, 2), "D": nn.Linear(2, 1)}
        self.phases = (Phase("D", "D", self.losses), Phase("G", "G", self.losses))

    def optimizer_scale(self, network):
        return 1.0

    def trainable(self, network):
        return {name for name, _ in self.networks[network].named_parameters()}

    def losses(self, batch):
        out = self.networks["D"](self.networks["G"](batch["x"]))
        return {"a": (out - batch["y"]).square().mean(), "b": 0.1 * out.abs().mean()}, {}


def make(*overrides):
    family = Toy()
    config = parse_config({}, ["stages=[{resolution: 4, kimg: 1}]", *overrides])
    engine = SingleEngine(config, family, 0.01, CPU)
    engine.prepare()
    return family, engine


def data(n=12):
    generator = torch.Generator().manual_seed(1)
    return {
        "x": torch.randn(n, 4, generator=generator),
        "y": torch.randn(n, 1, generator=generator),
    }


def step(engine, phase, batch, parts):
    size = len(batch["x"])
    for i, first in enumerate(range(0, size, size // parts)):
        micro = {k: v[first : first + size // parts] for k, v in batch.items()}
        losses, _ = engine.losses(phase, micro, last=i == parts - 1)
        engine.backward(phase, losses, len(micro["x"]) / size)
    return engine.step(phase)


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_any_number_of_microbatches_equals_plain_adam(parts):
    family, engine = make()
    reference = Toy()
    optimizer = torch.optim.Adam(reference.networks["G"].parameters(), lr=0.01, betas=(0.9, 0.99))
    for _ in range(5):
        update = step(engine, family.phases[1], data(), parts)
        assert update.applied
        optimizer.zero_grad()
        losses, _ = reference.losses(data())
        sum(losses.values()).backward()
        optimizer.step()
    for a, b in zip(
        family.networks["G"].parameters(), reference.networks["G"].parameters(), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_a_phase_changes_its_network_alone():
    family, engine = make()
    before = copy.deepcopy(family.networks)
    step(engine, family.phases[0], data(), 1)
    assert torch.equal(before["G"].weight, family.networks["G"].weight)
    assert not torch.equal(before["D"].weight, family.networks["D"].weight)
    assert family.networks["G"].weight.grad is None


def test_clipping_bounds_the_step_of_the_gradient():
    family, engine = make("engine.clip_grad_norm=0.001")
    seen = {}
    optimizer = engine.optimizers["G"]

    def look(*args):
        grads = [p.grad for p in family.networks["G"].parameters()]
        seen["norm"] = torch.cat([g.flatten() for g in grads]).norm().item()

    optimizer.register_step_pre_hook(look)
    update = step(engine, family.phases[1], data(), 2)
    assert update.grad_norm > 0.001
    assert seen["norm"] == pytest.approx(0.001, rel=1e-3)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_batch_that_is_not_finite_changes_nothing(value):
    family, engine = make()
    step(engine, family.phases[1], data(), 1)
    before = copy.deepcopy(family.networks["G"].state_dict())
    state = copy.deepcopy(engine.optimizers["G"].state_dict())
    bad = data()
    bad["x"][3] = value
    assert not step(engine, family.phases[1], bad, 2).applied
    for name, tensor in family.networks["G"].state_dict().items():
        assert torch.equal(tensor, before[name])
    assert str(engine.optimizers["G"].state_dict()) == str(state)
    assert step(engine, family.phases[1], data(), 1).applied, "the next good batch is applied"


def test_state_goes_through_names_and_comes_back():
    family, engine = make()
    for _ in range(3):
        step(engine, family.phases[1], data(), 1)
    tensors, rest = engine.state()
    assert set(tensors) == {
        f"G/{p}/{k}" for p in ("weight", "bias") for k in ("exp_avg", "exp_avg_sq", "step")
    }
    tensors = {k: v.clone() for k, v in tensors.items()}
    other_family, other = make()
    for name, network in other_family.networks.items():
        network.load_state_dict(family.networks[name].state_dict())
    other.load_state(tensors, rest)
    for e, f in ((engine, family), (other, other_family)):
        step(e, f.phases[1], data(), 1)
    assert torch.equal(family.networks["G"].weight, other_family.networks["G"].weight)


def test_fp16_on_a_cpu_is_refused_and_auto_is_fp32():
    assert resolve_precision("auto", CPU) == "fp32"
    with pytest.raises(ConfigError, match=r"engine\.precision"):
        resolve_precision("fp16", CPU)


def test_bf16_autocast_reaches_the_forward():
    family, engine = make("engine.precision=bf16")
    losses, _ = engine.losses(family.phases[1], data(), last=True)
    assert losses["b"].dtype == torch.bfloat16


def test_single_on_several_ranks_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    config = parse_config({}, ["engine.name=single"])
    with pytest.raises(ConfigError, match=r"engine\.name"):
        make_engine(config, Toy(), 0.01, CPU)


def test_fp16_scales_losses_and_backs_off_where_gradients_overflow(monkeypatch):
    """The scaler's arithmetic, on the CPU: autocast and the scaler work there too."""
    monkeypatch.setattr(engine_module, "resolve_precision", lambda precision, device: "fp16")
    family, engine = make("engine.precision=fp16")
    phase, scaler = family.phases[1], engine.scalers["G"]
    losses, _ = engine.losses(phase, data(), last=True)
    assert losses["b"].dtype == torch.float16
    first = scaler.get_scale()
    huge = data()
    huge["y"] *= 1e4
    assert not step(engine, phase, huge, 1).applied, "the scaled gradient overflows in fp16"
    assert scaler.get_scale() == first / 2
    start = engine.losses(phase, data(), last=True)[0]["a"].item()
    updates = [step(engine, phase, data(), 2) for _ in range(60)]
    assert sum(u.applied for u in updates) > 40
    assert engine.losses(phase, data(), last=True)[0]["a"].item() < 0.9 * start
    tensors, rest = engine.state()
    _, other = make("engine.precision=fp16")
    other.load_state({k: v.clone() for k, v in tensors.items()}, rest)
    assert other.scalers["G"].get_scale() == scaler.get_scale()


FAULTS = """
import resource, sys
import torch
from dinogen.training.engines.base import keep_freed_memory

if sys.argv[1] == "kept":
    assert keep_freed_memory()
def step():
    return [torch.ones(2**20) for _ in range(16)]  # 64 MiB
step(); step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators are not told")
def test_memory_that_a_step_frees_is_there_for_the_next():
    def faults(how):
        return int(subprocess.check_output([sys.executable, "-c", FAULTS, how], text=True))

    # ten steps touch 163,840 pages, and a tensor has 1,024, one of which may move once
    assert faults("kept") < 5000
    # by chance a small block lies above the tensors, and nothing is given back
    assert any(faults("as usual") > 100_000 for _ in range(20))
