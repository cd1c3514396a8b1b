"""Trains a family on drawn images through the real engine and averages; no data on disk."""

from __future__ import annotations

import torch

from dinogen.config import parse_config
from dinogen.families.abilities import FollowsSteps
from dinogen.families.registry import family_class, resolve
from dinogen.training.checkpointing.snapshot import Ema
from dinogen.training.engines import make_engine

CPU = torch.device("cpu")


def drawn_images(num: int, resolution: int) -> torch.Tensor:
    """Discs of one colour on a ground of another, (num, 3, R, R) in [-1, 1]; no two alike."""
    generator = torch.Generator().manual_seed(0)
    axis = torch.linspace(-1, 1, resolution)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    images = []
    for i in range(num):
        ground, disc = (torch.rand(2, 3, 1, 1, generator=generator) * 1.6 - 0.8).unbind()
        angle = torch.tensor(2 * torch.pi * i / num)
        distance = (x - 0.4 * angle.cos()).square() + (y - 0.4 * angle.sin()).square()
        inside = torch.sigmoid((0.2 - distance) * 40)
        images.append(torch.lerp(ground, disc, inside))
    return torch.stack(images)


def make_family(name: str, resolution: int, *overrides: str, seed: int = 0):
    """A family of one stage with random weights."""
    stage = f"stages=[{{resolution: {resolution}, kimg: 1, batch: 16, lr: 1.0e-3}}]"
    config = resolve(parse_config({"family": {"name": name}}, [stage, *overrides]))
    torch.manual_seed(seed)
    return family_class(config.family)(config, config.stages[0], CPU)


def make_batch(images: torch.Tensor, step: int = 0, size: int | None = None) -> dict:
    """A batch as the stream gives it, whose images come round again and again."""
    size = size or len(images)
    position = torch.arange(step * size, (step + 1) * size)
    keys = [str(p) for p in position.tolist()]
    return {"image": images[position % len(images)], "position": position, "key": keys}


class Training:
    """Steps of a family, in the trainer's order but without its files."""

    def __init__(self, family) -> None:
        self.family, self.stage, self.step = family, family.stage, 0
        self.engine = make_engine(family.config, family, family.stage.lr, CPU)
        self.engine.prepare()
        self.ema = Ema({n: family.networks[n] for n in family.ema_networks}, family.config.ema)

    def run(self, images: torch.Tensor, num_steps: int) -> None:
        """Train N more steps."""
        for _ in range(num_steps):
            batch = make_batch(images, self.step, self.stage.batch)
            for phase in self.family.phases:
                if phase.due(self.step):
                    self.update(phase, batch)
            self.step += 1
            nimg = self.step * self.stage.batch
            if isinstance(self.family, FollowsSteps):
                self.family.after_step(nimg)
            self.ema.update(self.stage.batch, nimg)

    def update(self, phase, batch: dict) -> None:
        """One phase on one batch."""
        losses, _ = self.engine.losses(phase, batch, last=True)
        self.engine.backward(phase, losses, 1.0)
        assert self.engine.step(phase).applied

    @torch.no_grad()
    def samples(self, num: int) -> torch.Tensor:
        """Images of the averaged networks."""
        return self.family.sample(self.ema.networks, torch.arange(num), seed=0)


def energy_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Between two sets of images (Szekely and Rizzo 2013); 0 only for the same distribution.

    So neither blurs nor one image again and again come near.
    """
    a, b = a.flatten(1), b.flatten(1)
    within = torch.cdist(a, a).mean() + torch.cdist(b, b).mean()
    return (2 * torch.cdist(a, b).mean() - within).item()


def weights(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Copies of its trained tensors."""
    return {name: p.detach().clone() for name, p in network.named_parameters()}


def changed(network: torch.nn.Module, before: dict[str, torch.Tensor]) -> set[str]:
    """Names of the parameters that are no longer what they were."""
    return {name for name, p in network.named_parameters() if not torch.equal(p, before[name])}


def assert_each_phase_changes_its_network_alone(family, images: torch.Tensor) -> None:
    """Every parameter of its network moves and gets its gradient; those of others do not."""
    training = Training(family)
    for phase in family.phases:
        before = {name: weights(network) for name, network in family.networks.items()}
        losses, report = training.engine.losses(phase, make_batch(images), last=True)
        for value in (losses | report).values():
            assert value.shape == () and torch.isfinite(value)
        training.engine.backward(phase, losses, 1.0)
        for name, network in family.networks.items():
            trained = family.trainable(name) if name == phase.network else set()
            assert {n for n, p in network.named_parameters() if p.grad is not None} == trained
        training.engine.step(phase)
        for name, network in family.networks.items():
            if name != phase.network:
                assert changed(network, before[name]) == set(), phase.name
        assert changed(family.networks[phase.network], before[phase.network])


def gradients(family, phase, parts: list[tuple[dict, float]]) -> dict[str, torch.Tensor]:
    """Gradients of a phase over the parts of a batch, each with its share."""
    training = Training(family)
    for batch, share in parts:
        losses, _ = training.engine.losses(phase, batch, last=True)
        training.engine.backward(phase, losses, share)
    network = family.networks[phase.network]
    found = {n: p.grad.clone() for n, p in network.named_parameters() if p.grad is not None}
    network.zero_grad(set_to_none=True)
    return found


def assert_any_cut_gives_the_same_gradient(family, images: torch.Tensor, cut: int) -> None:
    """A batch in one piece, and in two of unlike size."""
    batch = make_batch(images)
    first = {key: value[:cut] for key, value in batch.items()}
    second = {key: value[cut:] for key, value in batch.items()}
    share = cut / len(images)
    for phase in family.phases:
        whole = gradients(family, phase, [(batch, 1.0)])
        parts = gradients(family, phase, [(first, share), (second, 1 - share)])
        assert whole.keys() == parts.keys()
        for name, value in whole.items():
            torch.testing.assert_close(parts[name], value, rtol=1e-3, atol=1e-5)
