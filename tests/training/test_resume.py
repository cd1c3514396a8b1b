"""A run that is killed and started again ends as one that never was."""

from __future__ import annotations

import random
import signal

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dinogen.training.run import train
from dinogen.training.stop import Stopped
from tests import forked
from tests.training.helpers import curve, stage, start, train_and_die, weights


def tensorboard(config, resolution, tag="loss"):
    events = EventAccumulator(str(stage(config, resolution) / "tb"))
    events.Reload()
    return [(e.step, e.value) for e in events.Scalars(tag)]


def assert_same_run(config, reference):
    for resolution in (4, 8):
        a, b = weights(config, resolution), weights(reference, resolution)
        assert a.keys() == b.keys()
        different = [name for name in a if not torch.equal(a[name], b[name])]
        assert not different, f"stage {resolution}: {different}"
        assert curve(config, resolution) == curve(reference, resolution)
        assert tensorboard(config, resolution) == tensorboard(reference, resolution)


def test_killed_at_random_moments_it_ends_bitwise_the_same(make_config):
    given = ["stages.0.decay_kimg=0.064", "stages.1.warmup_kimg=0.1"]
    reference = make_config(*given, run="whole")
    process = start(reference)
    process.join(240)
    assert process.exitcode == 0

    config = make_config(*given, run="killed")
    rng = random.Random(0)
    # killed soon after it has come so far, wherever that is: amid steps, a save, the next stage
    for nimg in (0, *sorted(rng.sample(range(24, 200), 4))):
        arguments = (config.model_dump(mode="json"), nimg, rng.uniform(0, 0.05))
        process = forked.context().Process(target=train_and_die, args=arguments)
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    process = start(config)
    process.join(240)
    assert process.exitcode == 0
    assert_same_run(config, reference)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_a_signal_saves_and_stops_between_two_log_lines(make_config, name, monkeypatch):
    """Stopped at a step that no rhythm falls on, the next log line is still the same."""
    from dinogen.training.trainer import Trainer

    reference = make_config(run="whole")
    train(reference)
    config = make_config(run="stopped")
    step = Trainer.train_step

    def raise_signal(self, batch):
        step(self, batch)
        if self.progress.step == 15:
            signal.raise_signal(getattr(signal, name))

    monkeypatch.setattr(Trainer, "train_step", raise_signal)
    with pytest.raises(Stopped, match=f"{name} at 120 images") as stopped:
        train(config)
    assert stopped.value.exit_code == 75
    monkeypatch.undo()
    train(config)
    assert_same_run(config, reference)


def test_a_broken_newest_checkpoint_costs_only_its_steps(make_config, caplog):
    reference = make_config(run="whole")
    train(reference)
    config = make_config("stages.1.kimg=0.12", run="broken")
    train(config)
    newest = max((stage(config, 8) / "checkpoints").iterdir())
    (newest / "G.safetensors").write_bytes(b"lost")
    config = make_config(run="broken")
    train(config)
    assert "broken and skipped" in caplog.text
    for name, value in weights(config, 8).items():
        assert torch.equal(value, weights(reference, 8)[name])
    assert curve(config, 8)[-1] == curve(reference, 8)[-1]
