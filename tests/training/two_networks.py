"""A toy family of two networks with lazy regularisers; run under torchrun it trains in one engine
after the other and writes what each ends with.

    torchrun --nproc-per-node 2 tests/training/two_networks.py OUT CASE...

A case is ENGINE:ZERO:MICRO_BATCH:NORM, such as deepspeed:2:3:none. CASE@STEP saves and resumes at
that step; CASE<FILE goes on from a state of step HALF that another world wrote.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from dinogen.config import parse_config
from dinogen.distributed import process_group, rng
from dinogen.families.base import Phase
from dinogen.training.engines import make_engine
from dinogen.training.engines.base import num_micros, split

BATCH = 9
NUM_STEPS = 10
HALF = 5
SWITCH = 4  # from here on all parameters of G train, before only its last layer


class Generator(nn.Module):
    def __init__(self, norm: str) -> None:
        super().__init__()
        # No bias before a batch norm: its gradient is rounding, which Adam would blow up.
        self.mapping = nn.Linear(4, 6, bias=norm == "none")
        self.norm = nn.BatchNorm1d(6) if norm == "batch" else nn.Identity()
        self.out = nn.Linear(6, 3, bias=norm == "none")  # one comes in D

    def forward(self, z):
        return self.out(torch.tanh(self.norm(self.mapping(z))))


class TwoNetworks:
    """G and D, hinge losses, R1 on D every 2 steps, a penalty through G.mapping every 4."""

    def __init__(self, config, norm: str) -> None:
        self.config, self.stage = config, config.stages[0]
        with rng.torch_seed(0, "toy"):
            self.G = Generator(norm)
            middle = nn.BatchNorm1d(8) if norm == "batch" else nn.Identity()
            first = nn.Linear(3, 8, bias=norm == "none")
            self.D = nn.Sequential(first, middle, nn.Softplus(), nn.Linear(8, 1))
        self.networks = {"G": self.G, "D": self.D}
        self.fading = True
        self.phases = (
            Phase("D", "D", self.train_d),
            Phase("D_reg", "D", self.r1, every=2),
            Phase("G", "G", self.train_g),
            Phase("G_reg", "G", self.path, every=4),
        )

    def optimizer_scale(self, network):
        return {"G": 4 / 5, "D": 2 / 3}[network]

    def trainable(self, network):
        names = {name for name, _ in self.networks[network].named_parameters()}
        if network == "G" and self.fading:
            return {name for name in names if name.startswith("out")}
        return names

    def z(self, batch):
        return rng.normal(0, "z", batch["position"], (4,))

    def train_d(self, batch):
        fake, real = self.D(self.G(self.z(batch)).detach()), self.D(batch["x"])
        return {"fake": (1 + fake).relu().mean(), "real": (1 - real).relu().mean()}, {}

    def train_g(self, batch):
        return {"g": -self.D(self.G(self.z(batch))).mean()}, {}

    def r1(self, batch):
        x = batch["x"].clone().requires_grad_()
        logits = self.D(x)
        (gradient,) = torch.autograd.grad(logits.sum(), x, create_graph=True)
        return {"r1": 5 * gradient.square().sum(1).mean() + 0 * logits.sum()}, {}

    def path(self, batch):
        w = self.G.mapping(self.z(batch))
        w = w if w.requires_grad else w.requires_grad_()
        out = self.G.out(torch.tanh(w))
        (gradient,) = torch.autograd.grad(out.sum(), w, create_graph=True)
        # every trained parameter gets a gradient, be it zero
        unused = sum(p.sum() for p in self.G.parameters() if p.requires_grad)
        return {"path": gradient.square().sum(1).mean() + 0 * unused}, {}


def rate(step: int) -> float:
    """Share of the learning rate that a step takes."""
    return min(1.0, (step + 1) / 3, (NUM_STEPS - step) / 4)


def share(step: int) -> dict:
    """This rank's part of a global batch; the ranks' parts differ in size."""
    rank, size = process_group.rank(), process_group.world_size()
    positions = torch.arange(step * BATCH, (step + 1) * BATCH)
    x = rng.normal(0, "x", positions, (3,)) + 1
    mine = torch.tensor_split(torch.arange(BATCH), size)[rank]
    return {"x": x[mine], "position": positions[mine], "key": [str(i) for i in mine.tolist()]}


class Training:
    """One engine in the midst of its steps; ``state`` in another one's hands goes on from there."""

    def __init__(self, case: str) -> None:
        name, zero, micro, norm = case.split(":")
        self.config = parse_config(
            {},
            [
                f"engine.name={name}",
                f"engine.zero={zero}",
                f"engine.micro_batch={micro}",
                "engine.clip_grad_norm=0.5",
                f"stages=[{{resolution: 4, kimg: 1, batch: {BATCH}}}]",
            ],
        )
        self.family = TwoNetworks(self.config, norm)
        self.engine = make_engine(self.config, self.family, 0.01, torch.device("cpu"))
        self.rest = None

    def steps(self, start: int, end: int) -> None:
        """Run steps start to end - 1."""
        self.family.fading = start < SWITCH
        self.engine.prepare()
        parts = num_micros(BATCH, process_group.world_size(), self.config.engine.micro_batch)
        for step in range(start, end):
            if step == SWITCH and self.family.fading:
                self.family.fading = False
                self.engine.prepare()
            self.engine.set_lr(rate(step))
            micros = split(share(step), parts, self.engine.device)
            for phase in self.family.phases:
                if not phase.due(step):
                    continue
                for i, (batch, num_samples) in enumerate(micros):
                    losses, _ = self.engine.losses(phase, batch, last=i == len(micros) - 1)
                    self.engine.backward(phase, losses, num_samples / BATCH)
                assert self.engine.step(phase).applied

    def state(self) -> dict[str, torch.Tensor]:
        """Every weight and every piece of optimizer state."""
        tensors, self.rest = self.engine.state()
        for network, module in self.family.networks.items():
            tensors |= {f"{network}/{key}": value for key, value in module.state_dict().items()}
        return {key: value.detach().clone() for key, value in tensors.items()}

    def load(self, state: dict[str, torch.Tensor]) -> None:
        """Take over what :meth:`state` of any engine gave."""
        for network, module in self.family.networks.items():
            own = {key: state[f"{network}/{key}"] for key in module.state_dict()}
            module.load_state_dict(own)
        optimizers = {k: v for k, v in state.items() if k.count("/") == 2}
        self.engine.load_state(optimizers, {name: {} for name in self.family.networks})


def run(
    case: str, resumed_at: int | None = None, out: Path | None = None
) -> dict[str, torch.Tensor]:
    """All steps of a case, if asked for with a fresh engine in the midst, whose start is kept."""
    training = Training(case)
    if resumed_at is not None:
        training.steps(0, resumed_at)
        state = training.state()
        if out is not None and resumed_at == HALF and process_group.is_main():
            engine = "-".join(case.split(":")[:2])
            save_file(state, out / f"half-{engine}.safetensors")
        training = Training(case)
        training.load(state)
    training.steps(resumed_at or 0, NUM_STEPS)
    return training.state()


def run_here(out: Path, item: str) -> None:
    """One argument of the command line: CASE, CASE@STEP, or CASE<FILE to go on from HALF."""
    case, _, resumed_at = item.partition("@")
    case, _, file = case.partition("<")
    if file:
        training = Training(case)
        training.load(load_file(out / file))
        training.steps(HALF, NUM_STEPS)
        result = training.state()
    else:
        result = run(case, int(resumed_at) if resumed_at else None, out)
    if process_group.is_main():
        save_file(result, out / file_name(item))


def file_name(item: str) -> str:
    """Where the result of an argument lies."""
    return re.sub(r"[^a-z0-9]", "-", item) + ".safetensors"


if __name__ == "__main__":
    torch.set_num_threads(1)
    process_group.init()
    for item in sys.argv[2:]:
        run_here(Path(sys.argv[1]), item)
    process_group.shutdown()
