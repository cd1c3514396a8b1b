"""Memorisation: whether samples are nearer to training images than other real images are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dinogen.metrics.manifold import nearest
from dinogen.metrics.value import Estimate, halves, standard_deviation

_SAME = 1e-6  # of the rows' norm: what rounding leaves of the distance of a row to itself is below


@dataclass(frozen=True)
class Pair:
    """A sample and the training image nearest to it: their numbers, and their distance."""

    sample: int
    train: int
    distance: float


@dataclass(frozen=True)
class Memorisation:
    """The ratio, and the closest pairs of a sample and a training image.

    Attributes:
        ratio: mean distance of samples to their nearest training image over that of held-out
            images. Near 1: as new as real images; near 0: copies. Far above 1 a sample is
            like no image at all.
        pairs: the closest, nearest first, for people to look at.
    """

    ratio: Estimate
    pairs: list[Pair]


def memorisation(
    generated: Tensor,
    train: Tensor,
    held_out: Tensor,
    num: int = 0,
    seed: int = 0,
    num_pairs: int = 16,
) -> Memorisation:
    """Compare nearest neighbours in the training set.

    Args:
        generated: (N, C) features of samples.
        train: (M, C) of training images.
        held_out: (K, C) of real images that were not trained on.
        num: halves of the generated rows for the spread.
        seed: of the halves.
        num_pairs: how many of the closest pairs to return.

    Raises:
        ValueError: one of them is empty, or every held-out image is in the training set.
    """
    if not (len(generated) and len(train) and len(held_out)):
        raise ValueError("memorisation takes samples, training images and held-out images")
    usual = float(nearest(held_out, train, 1)[0].mean())
    if usual < _SAME * float(train.norm(dim=1).mean()):
        raise ValueError("every held-out image is in the training set too")
    distances, numbers = nearest(generated, train, 1)
    distances, numbers = distances[:, 0].cpu(), numbers[:, 0].cpu()
    values = [float(distances[rows].mean()) / usual for rows in halves(len(generated), num, seed)]
    closest = torch.argsort(distances, stable=True)[:num_pairs].tolist()
    return Memorisation(
        ratio=Estimate(float(distances.mean()) / usual, standard_deviation(values)),
        pairs=[Pair(i, int(numbers[i]), float(distances[i])) for i in closest],
    )
