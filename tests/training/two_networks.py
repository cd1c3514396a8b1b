"""A toy family of two networks with lazy regularisers; run under torchrun it trains in one engine
after the other and writes what each ends with.

    torchrun --nproc-per-node 2 tests/training/two_networks.py OUT CASE...

A case is ENGINE:ZERO:MICRO_BATCH:NORM, such as deepspeed:2:3:none.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from dinogen import dist, draws
from dinogen.config import parse_config
from dinogen.families.base import Phase
from dinogen.training.batches import num_micros, split
from dinogen.training.engine import make_engine

BATCH = 9
NUM_STEPS = 10
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
        with draws.torch_seed(0, "toy"):
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

    def trainable(self, network):
        names = {name for name, _ in self.networks[network].named_parameters()}
        if network == "G" and self.fading:
            return {name for name in names if name.startswith("out")}
        return names

    def z(self, batch):
        return draws.normal(0, "z", batch["position"], (4,))

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


def share(step: int) -> dict:
    """This rank's part of a global batch; the ranks' parts differ in size."""
    rank, size = dist.rank(), dist.world_size()
    positions = torch.arange(step * BATCH, (step + 1) * BATCH)
    x = draws.normal(0, "x", positions, (3,)) + 1
    mine = torch.tensor_split(torch.arange(BATCH), size)[rank]
    return {"x": x[mine], "position": positions[mine], "key": [str(i) for i in mine.tolist()]}


def run(case: str) -> dict[str, torch.Tensor]:
    """Train and return every weight and every piece of optimizer state."""
    name, zero, micro, norm = case.split(":")
    config = parse_config(
        {},
        [
            f"engine.name={name}",
            f"engine.zero={zero}",
            f"engine.micro_batch={micro}",
            "engine.clip_grad_norm=0.5",
            f"stages=[{{resolution: 4, kimg: 1, batch: {BATCH}}}]",
        ],
    )
    family = TwoNetworks(config, norm)
    engine = make_engine(config, family, 0.01, torch.device("cpu"))
    engine.prepare()
    parts = num_micros(BATCH, dist.world_size(), config.engine.micro_batch)
    for step in range(NUM_STEPS):
        if step == SWITCH:
            family.fading = False
            engine.prepare()
        micros = split(share(step), parts, engine.device)
        for phase in family.phases:
            if not phase.due(step):
                continue
            for i, (batch, num_samples) in enumerate(micros):
                losses, _ = engine.losses(phase, batch, last=i == len(micros) - 1)
                engine.backward(phase, losses, num_samples / BATCH)
            assert engine.step(phase).applied
    found = {
        f"{network}/{key}": value
        for network, module in family.networks.items()
        for key, value in module.state_dict().items()
    }
    tensors, _ = engine.state()
    return {k: v.detach().clone() for k, v in (found | tensors).items()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init()
    for case in sys.argv[2:]:
        result = run(case)
        if dist.is_main():
            save_file(result, Path(sys.argv[1]) / f"{case.replace(':', '-')}.safetensors")
        dist.barrier()
    dist.shutdown()
