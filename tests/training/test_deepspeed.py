"""The DeepSpeed engine: guards, clipping and loss scaling on one rank, a whole run on two."""

from __future__ import annotations

import base64
import copy
import json
import os
import socket
import subprocess
import sys

import pytest
import torch

from dinogen.config import ConfigError, dump_config, parse_config
from dinogen.distributed import process_group
from dinogen.training.engines import base as engine_module
from dinogen.training.engines import deepspeed as module
from dinogen.training.run import train
from tests.training.helpers import curve, weights
from tests.training.test_engine import Toy, data, step

CPU = torch.device("cpu")


@pytest.fixture(autouse=True, scope="module")
def group():
    """One process group for all: DeepSpeed keeps the first one that it meets."""
    yield
    process_group.shutdown()


def make(zero, *overrides):
    family = Toy()
    config = parse_config({}, ["stages=[{resolution: 4, kimg: 1, batch: 12}]", *overrides])
    family.stage = config.stages[0]
    config.engine.zero = zero
    engine = module.DeepSpeedEngine(config, family, 0.01, CPU)
    engine.prepare()
    return family, engine


@pytest.mark.parametrize("zero", [0, 1, 2])
def test_a_batch_that_is_not_finite_changes_nothing(zero):
    family, engine = make(zero, "engine.clip_grad_norm=1.0")
    phase = family.phases[1]
    step(engine, phase, data(), 1)
    before = copy.deepcopy(family.networks["G"].state_dict())
    state = {k: v.clone() for k, v in engine.state()[0].items()}
    assert any(value.any() for value in state.values())
    bad = data()
    bad["x"][3] = float("nan")
    assert not step(engine, phase, bad, 1).applied
    for name, tensor in family.networks["G"].state_dict().items():
        assert torch.equal(tensor, before[name])
    for name, tensor in engine.state()[0].items():
        assert torch.equal(tensor, state[name])
    assert step(engine, phase, data(), 1).applied, "the next good batch is applied"
    assert not torch.equal(family.networks["G"].weight, before["weight"])


@pytest.mark.parametrize("zero", [0, 1, 2])
def test_clipping_bounds_the_step_and_unset_means_none(zero):
    # Adam hides the scale of a gradient: its first moment after one step does not
    norms = {}
    for clip in ("0.001", "null"):
        family, engine = make(zero, f"engine.clip_grad_norm={clip}")
        steep = data()
        steep["y"] *= 10
        update = step(engine, family.phases[1], steep, 1)
        assert update.grad_norm > 1.05, "clipped by DeepSpeed's own default"
        tensors, _ = engine.state()
        moments = torch.cat([v.flatten() for k, v in tensors.items() if k.endswith("exp_avg")])
        norms[clip] = (moments.norm() / 0.1).item()
        if clip == "null":
            assert norms[clip] == pytest.approx(update.grad_norm.item(), rel=1e-4)
    assert norms["0.001"] == pytest.approx(0.001, rel=1e-2)


@pytest.mark.parametrize("zero", [0, 1, 2])
def test_fp16_scales_losses_and_backs_off_where_gradients_overflow(monkeypatch, zero):
    """The scaler's arithmetic, on the CPU: autocast and the scaler work there too."""
    monkeypatch.setattr(engine_module, "resolve_precision", lambda precision, device: "fp16")
    family, engine = make(zero, "engine.precision=fp16")
    phase, scaler = family.phases[1], engine.scalers["G"]
    losses, _ = engine.losses(phase, data(), last=True)
    assert losses["b"].dtype == torch.float16
    first = scaler.get_scale()
    huge = data()
    huge["y"] *= 1e4
    assert not step(engine, phase, huge, 1).applied, "the scaled gradient overflows in fp16"
    assert scaler.get_scale() == first / 2
    start = engine.losses(phase, data(), last=True)[0]["a"].item()
    updates = [step(engine, phase, data(), 1) for _ in range(60)]
    assert sum(u.applied for u in updates) > 40
    assert engine.losses(phase, data(), last=True)[0]["a"].item() < 0.9 * start
    assert updates[-1].grad_norm < 100, "told without the scale"


def test_what_deepspeed_is_told_follows_the_config():
    config = parse_config(
        {}, ["engine={name: deepspeed, zero: 2, micro_batch: 3}", "stages.0.batch=20"]
    )
    told = module.deepspeed_config(config, config.stages[0], world_size=3)
    assert told["zero_optimization"]["stage"] == 2
    assert told["gradient_clipping"] == 0.0, "left out it would clip at 1"
    assert (told["train_micro_batch_size_per_gpu"], told["gradient_accumulation_steps"]) == (3, 3)
    json.dumps(told)


def test_zero_3_is_refused_with_the_reason():
    with pytest.raises(ConfigError, match=r"engine\.zero: ZeRO 3 shards the weights .* 0, 1 or 2"):
        parse_config({}, ["engine.zero=3"])


def test_without_deepspeed_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(ConfigError, match=r"engine\.name: .*dinogen\[deepspeed\]"):
        make(1)


def test_a_run_by_the_deepspeed_launcher_equals_one_process(make_config, tmp_path):
    changes = ["stages.0.kimg=0.045", "stages.0.lr=0.002", "stages.1.lr=0.002"]
    # an odd batch, and microbatches that do not divide it
    changes += ["stages.0.batch=9", "stages.1.batch=9", "stages.1.kimg=0.18"]
    one = make_config(*changes, run="one")
    train(one)
    two = make_config(*changes, "engine={name: deepspeed, zero: 2, micro_batch: 2}", run="two")
    path = tmp_path / "two.yaml"
    path.write_text(dump_config(two))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = base64.urlsafe_b64encode(json.dumps({"localhost": [0, 1]}).encode()).decode()
    command = [sys.executable, "-m", "deepspeed.launcher.launch", "--no_local_rank"]
    command += [f"--world_info={world}", "--master_addr=127.0.0.1", f"--master_port={port}"]
    command += ["--module", "launch.cli", "train", str(path)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    for resolution in (4, 8):
        a, b = weights(one, resolution), weights(two, resolution)
        assert a.keys() == b.keys()
        for name in a:
            torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=2e-5, msg=name)
        for x, y in zip(curve(one, resolution), curve(two, resolution), strict=True):
            assert x == pytest.approx(y, rel=1e-4, nan_ok=True)
