"""What every family has to do; whichever is found in the folder is tested."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dinogen.distributed import rng
from dinogen.families.registry import family_class, family_names
from dinogen.training.checkpointing.checkpoint import newest_checkpoint
from dinogen.training.checkpointing.snapshot import ema_decay
from dinogen.training.run import train
from dinogen.training.state import StageState
from dinogen.training.trainer import Trainer
from tests.families.tiny import BATCH, RESOLUTION, TINY, tiny_config
from tests.families.train_families import run_of
from tests.forked import torchrun

FAMILIES = [pytest.param(name, id=name) for name in TINY]
every_family = pytest.mark.parametrize("family", FAMILIES)


def test_each_has_tiny_options():
    assert {name.partition("-")[0] for name in TINY} == {*family_names()}, (
        "add the new family to tests/families/tiny.py"
    )


def tensors(config) -> dict[str, torch.Tensor]:
    """Every tensor of the newest checkpoint."""
    found = newest_checkpoint(config.run / f"{RESOLUTION}x{RESOLUTION}" / "checkpoints")
    assert found is not None
    names = sorted(path.stem for path in found.folder.glob("*.safetensors"))
    return {f"{n}/{k}": v for n in names for k, v in found.tensors(n).items()}


def parameters(family) -> dict[str, dict[str, torch.Tensor]]:
    return {
        name: {key: p.detach().clone() for key, p in network.named_parameters()}
        for name, network in family.networks.items()
    }


@every_family
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_each_phase_changes_its_network_alone(family, precision, disc_data, tmp_path):
    config = tiny_config(family, disc_data, tmp_path, f"engine.precision={precision}")
    state = StageState(config, 0)
    inputs = state.family.inputs
    batch = state.data.read(range(BATCH), image_size=inputs.image_size, levels=inputs.levels)
    state.engine.prepare()
    assert {phase.network for phase in state.family.phases} == set(state.family.networks)
    assert state.family.main_loss in {phase.name for phase in state.family.phases}
    for phase in state.family.phases:
        before = parameters(state.family)
        losses, report = state.engine.losses(phase, batch, last=True)
        assert losses
        for name, value in (losses | report).items():
            assert torch.isfinite(value).all(), (phase.name, name)
        assert set(phase.remembered) <= set(report)
        state.engine.backward(phase, losses, 1.0)
        for name, network in state.family.networks.items():
            trained = state.family.trainable(name) if name == phase.network else set()
            with_gradient = {k for k, p in network.named_parameters() if p.grad is not None}
            assert with_gradient == trained, (
                f"phase {phase.name} leaves gradients elsewhere in {name}"
            )
        assert state.engine.step(phase).applied
        after = parameters(state.family)
        for name in before:
            changed = any(not torch.equal(v, after[name][k]) for k, v in before[name].items())
            assert changed == (name == phase.network), (phase.name, name)


@every_family
def test_resumed_it_ends_bitwise_as_uninterrupted(family, disc_data, tmp_path):
    whole = tiny_config(family, disc_data, tmp_path / "whole")
    train(whole)
    train(tiny_config(family, disc_data, tmp_path / "parts", "stages.0.kimg=0.016"))
    parts = tiny_config(family, disc_data, tmp_path / "parts")
    train(parts)
    expected, found = tensors(whole), tensors(parts)
    assert expected.keys() == found.keys()
    assert [k for k, v in expected.items() if not torch.equal(v, found[k])] == []


@every_family
def test_the_average_is_the_recursion_over_the_steps(family, disc_data, tmp_path, monkeypatch):
    seen: list[dict[str, torch.Tensor]] = []
    step = Trainer.train_step

    def record(self, batch):
        if not seen:
            seen.append({k: v.clone() for k, v in averaged(self.family).items()})
        step(self, batch)
        seen.append({k: v.clone() for k, v in averaged(self.family).items()})

    def averaged(family):
        return {
            f"{name}.ema/{key}": parameter.detach()
            for name in family.ema_networks
            for key, parameter in family.networks[name].named_parameters()
        }

    monkeypatch.setattr(Trainer, "train_step", record)
    config = tiny_config(family, disc_data, tmp_path, "ema.halflife_kimg=0.02", "ema.rampup=1")
    train(config)
    found = tensors(config)
    expected = {key: value.double() for key, value in seen[0].items()}
    for number, weights in enumerate(seen[1:], start=1):
        decay = ema_decay(BATCH, number * BATCH, config.ema)
        expected = {k: decay * v + (1 - decay) * weights[k] for k, v in expected.items()}
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value.float(), rtol=1e-5, atol=1e-6)


@every_family
def test_samples_have_their_shape_and_do_not_depend_on_each_other(family, disc_data, tmp_path):
    state = StageState(tiny_config(family, disc_data, tmp_path), 0)
    with torch.no_grad():
        for network in state.ema.networks.values():
            # away from what is zero at the start
            for parameter in network.parameters():
                noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
                parameter += 0.02 * noise
        images = state.family.sample(state.ema.networks, torch.arange(5), seed=3)
        assert images.shape == (5, 3, RESOLUTION, RESOLUTION)
        assert images.min() >= -1
        assert images.max() <= 1
        alone = state.family.sample(state.ema.networks, torch.tensor([3]), seed=3)
        torch.testing.assert_close(alone[0], images[3], rtol=1e-4, atol=1e-4)
        assert (images[0] - images[1]).abs().max() > 1e-3, "each number has an image of its own"
        other = state.family.sample(state.ema.networks, torch.arange(5), seed=4)
        assert (images - other).abs().max() > 1e-3, "the seed matters"


@every_family
def test_every_network_is_rebuilt_from_its_arguments(family, disc_data, tmp_path):
    config = tiny_config(family, disc_data, tmp_path)
    with rng.torch_seed(0, "init"):
        built = family_class(config.family)(config, config.stages[0], torch.device("cpu"))
    for name, network in built.networks.items():
        again = type(network)(**built.arguments(name))
        again.load_state_dict(network.state_dict())


@pytest.fixture(scope="module")
def one_and_two(disc_data, tmp_path_factory):
    """All families trained by one process, and by two ranks in two engines."""
    out = tmp_path_factory.mktemp("engines")
    items = [f"{name}:{engine}" for name in TINY for engine in ("ddp", "deepspeed")]
    script = Path(__file__).with_name("train_families.py")
    done = torchrun(2, script, disc_data, out, *items, timeout=420)
    assert done.returncode == 0, done.stderr[-6000:]
    for name in TINY:
        train(tiny_config(name, disc_data, run_of(out, f"{name}:single")))
    return out


@every_family
@pytest.mark.parametrize("engine", ["ddp", "deepspeed"])
def test_two_ranks_equal_one(family, engine, one_and_two, disc_data):
    one = tensors(tiny_config(family, disc_data, run_of(one_and_two, f"{family}:single")))
    two = tensors(tiny_config(family, disc_data, run_of(one_and_two, f"{family}:{engine}")))
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=2e-3, atol=5e-5, msg=name)
