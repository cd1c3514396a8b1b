"""A feature extractor for drawn faces: which attributes an image shows. It guides no generator."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from safetensors.torch import load_model, save_model
from torch import nn
from torch.nn import functional as F

from tests import drawn

SIZE = 32
COUNTS = [len(values) for values in drawn.VALUES.values()]


class FeatureExtractor(nn.Module):
    """Three convolutions, one linear layer per attribute's values."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 16, 32, 64)
        layers: list[nn.Module] = []
        for i, o in itertools.pairwise(widths):
            layers += [nn.Conv2d(i, o, 3, 2, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU()]
        places = (SIZE // 8) ** 2
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * places, sum(COUNTS)))

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        """(N, 3, S, S) in [-1, 1], S a multiple of 32 -> logits of each attribute."""
        if images.shape[-1] != SIZE:
            images = F.avg_pool2d(images, images.shape[-1] // SIZE)
        return list(self.body(images).split(COUNTS, 1))

    @torch.no_grad()
    def attributes(self, images: torch.Tensor) -> np.ndarray:
        """(N, 5) int64, columns as in ``drawn.NAMES``."""
        return torch.stack([logits.argmax(1) for logits in self(images)], 1).numpy()


def train_extractor(seed: int = 1, num_steps: int = 150, batch: int = 64) -> FeatureExtractor:
    """Taught on images of its own, blurred, tinted and with noise."""
    rows = drawn.some_attributes(2000, seed)
    faces = drawn.as_tensor(drawn.draw(rows, [seed, 7]))
    wanted = torch.from_numpy(rows)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        extractor = FeatureExtractor()
        adam = torch.optim.Adam(extractor.parameters(), 2e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(adam, 3e-3, num_steps)
        for _ in range(num_steps):
            chosen = torch.randint(len(rows), (batch,))
            losses = [
                F.cross_entropy(logits, wanted[chosen, number])
                for number, logits in enumerate(extractor(_varied(faces[chosen])))
            ]
            adam.zero_grad()
            torch.stack(losses).sum().backward()
            adam.step()
            schedule.step()
    return extractor.eval()


def shared_extractor(tmp_path_factory) -> FeatureExtractor:
    """The extractor, trained once for all processes of a test run."""
    path = drawn.made_once(
        tmp_path_factory, "extractor.safetensors", lambda at: save_model(train_extractor(), at)
    )
    extractor = FeatureExtractor()
    load_model(extractor, path)
    return extractor.eval()


def _varied(images: torch.Tensor) -> torch.Tensor:
    """What generated images may differ in, and what says nothing about attributes."""
    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, 1)
    images = torch.lerp(images, blurred, 0.6 * torch.rand(len(images), 1, 1, 1))
    images = images + 0.1 * torch.randn(len(images), 3, 1, 1)
    return images + 0.06 * torch.randn_like(images)


def accuracy(found: np.ndarray, wanted: np.ndarray) -> dict[str, float]:
    """Share of images (N, 5) that show what was wanted, per attribute."""
    right = (found == wanted).mean(0)
    return {name: float(share) for name, share in zip(drawn.NAMES, right, strict=True)}
