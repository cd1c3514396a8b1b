"""What is not finite, wherever it comes from, costs one update on all ranks, and is counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dinogen.config import dump_config, load_config
from dinogen.distributed import process_group
from dinogen.training.run import train
from dinogen.training.trainer import Trainer, TrainingError
from tests.families.tiny import pack_discs, tiny_config
from tests.training.on_ranks import on_ranks

WHERE = ("loss", "gradient")


@pytest.fixture(scope="module")
def discs_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("discs") / "data"
    pack_discs(folder)
    return folder


def spoil(phase: str, step: int, where: str, rank: int) -> None:
    """From now on the losses or the gradient of one phase of one step are NaN on one rank."""
    from dinogen.training.engines.base import SingleEngine

    losses = SingleEngine.losses
    num = {"calls": 0}

    def spoilt(self: SingleEngine, of: Any, batch: Any, last: bool) -> Any:
        found, report = losses(self, of, batch, last)
        if of.name == phase:
            num["calls"] += 1
        if of.name == phase and num["calls"] == step and process_group.rank() == rank:
            name = next(iter(found))
            if where == "loss":
                found[name] = found[name] + torch.nan  # whose own gradient is finite
            else:
                found[name].register_hook(lambda gradient: gradient * torch.nan)
        return found, report

    SingleEngine.losses = spoilt  # type: ignore[method-assign]


def watch(out: Path, lag: int) -> None:
    """Note after each phase of each step which networks have changed, and the state of ADA."""
    init, update = Trainer.__init__, Trainer._update
    notes: list[Any] = []

    def begun(self: Trainer, *arguments: Any) -> None:
        init(self, *arguments)
        self.lag = lag

    def noted(self: Trainer, phase: Any, micros: Any) -> Any:
        networks = self.family.networks
        before = {n: [t.clone() for t in net.state_dict().values()] for n, net in networks.items()}
        found = update(self, phase, micros)
        changed = [
            name
            for name, network in networks.items()
            if not all(map(torch.equal, before[name], network.state_dict().values()))
        ]
        total = sum(float(p.double().sum()) for net in networks.values() for p in net.parameters())
        notes.append([phase.name, changed, bool(found.applied), total])
        (out / f"{process_group.rank()}.json").write_text(json.dumps(notes))
        return found

    Trainer.__init__ = begun  # type: ignore[method-assign]
    Trainer._update = noted  # type: ignore[method-assign]


def train_spoilt(config: str, out: str, phase: str, where: str, rank: int, lag: int) -> None:
    spoil(phase, 2, where, rank)
    watch(Path(out), lag)
    train(load_config(Path(config)))
    process_group.shutdown()


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize(("phase", "where"), [("D", "loss"), ("G", "gradient"), ("G", "loss")])
def test_one_rank_makes_all_leave_out_that_update(tmp_path, discs_folder, phase, where, lag):
    config = tiny_config("stylegan2_ada", discs_folder, tmp_path / "run", "family.ada_kimg=0.1")
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config))
    on_ranks(2, train_spoilt, str(path), str(tmp_path), phase, where, 1, lag)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second
    num = 0
    for name, changed, applied, _ in first:
        num += name == phase
        spoilt = name == phase and num == 2
        assert applied is not spoilt
        # not even the buffers: D's sign sum, G's mean w
        assert changed == ([] if spoilt else [name[0]]), (name, num)
    lines = [
        json.loads(line)
        for line in (config.run / "16x16/stats.jsonl").read_text().split("\n")
        if line
    ]
    norms = [line[f"{phase}/grad_norm"] for line in lines]
    assert [norm is None for norm in norms] == [False, True, False, False]


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("phase", ["D", "G"])
def test_too_many_in_a_row_end_the_run_and_nothing_blown_up_is_saved(
    tmp_path, discs_folder, monkeypatch, phase, lag, caplog
):
    config = tiny_config(
        "dcgan",
        discs_folder,
        tmp_path / "run",
        "engine.max_nonfinite=4",
        "checkpoint.every_kimg=0.008",
        "stages.0.kimg=0.2",
    )
    init, losses = Trainer.__init__, None
    from dinogen.training.engines.base import SingleEngine

    losses = SingleEngine.losses

    def begun(self, *arguments):
        init(self, *arguments)
        self.lag = lag
        engine = self.engine

        def spoilt(of, batch, last):
            found, report = losses(engine, of, batch, last)
            if of.name == phase and self.progress.step >= 3:
                found = {name: loss * torch.inf for name, loss in found.items()}
            return found, report

        engine.losses = spoilt

    monkeypatch.setattr(Trainer, "__init__", begun)
    with pytest.raises(TrainingError, match=rf"4 updates in a row were not finite \({phase}\)"):
        train(config)
    assert f"phase {phase} at 24 images" in caplog.text
    assert "(4 in a row, 4 end the run)" in caplog.text
    saved = sorted((config.run / "16x16/checkpoints").glob("0*"))
    # three in a row are a sign that the weights blew up; before that they are what they were
    assert int(saved[-1].name) == 40


def test_what_an_update_that_is_left_out_had_remembered_is_forgotten():
    from torch import nn

    from dinogen.transfer import Kept

    network = nn.BatchNorm1d(2)
    kept = Kept({"G": network})
    for sound in (True, False):
        with kept.unless(torch.tensor(sound)):
            network.running_mean += 1
            network.num_batches_tracked += 1
    assert network.running_mean.tolist() == [1, 1]
    assert network.num_batches_tracked == 1
    assert network.running_var.tolist() == [1, 1]
