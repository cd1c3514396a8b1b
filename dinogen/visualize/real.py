"""Looks that compare with real pictures, or ask D: worst, neighbours, reconstructions."""

from __future__ import annotations

import numpy as np
import torch

from dinogen.report.images import Sheet
from dinogen.visualize.nearest import real_pictures
from dinogen.visualize.scene import LeftOut, Look, Scene

NUM_WORST = 16
NUM_PAIRS = 8
NUM_ENCODED = 8


def worst(scene: Scene) -> Look:
    """The pictures of those drawn that are least real, and what says so."""
    opinions = scene.opinions
    if opinions is not None:
        order = torch.nan_to_num(opinions, nan=-torch.inf).argsort()[:NUM_WORST]
        labels = [f"D {opinions[i]:+.2f}" for i in order]
        why = "that the discriminator finds least real"
    else:
        distances = scene.nearest[0].distances[:, 0]
        order = torch.nan_to_num(distances, nan=torch.inf).argsort(descending=True)[:NUM_WORST]
        labels = [f"{scene.ruler.label} {distances[i]:.2f}" for i in order]
        why = f"that lie farthest from every training picture by the {scene.ruler.what}"
    caption = f"Of the first {len(scene.drawn)} samples the {len(order)} {why}, the worst first."
    return Look((Sheet(scene.drawn[order].numpy(), 4, labels),), caption)


def neighbours(scene: Scene) -> Look:
    """The samples that lie nearest to training pictures, above their neighbours."""
    found, usual = scene.nearest
    split = scene.family.config.data.split
    order = found.distances[:, 0].argsort()[:NUM_PAIRS]
    rows = [scene.drawn[order]]
    labels = [""] * len(order)
    for k in range(found.numbers.shape[1]):
        numbers = found.numbers[order, k].tolist()
        images = real_pictures(scene.data, numbers, split, scene.resolution)
        turned = found.mirrored[order, k][:, None, None, None]
        rows.append(torch.where(turned, images.flip(3), images))
        labels += [f"{scene.ruler.label} {d:.2f}" for d in found.distances[order, k]]
    caption = (
        f"Of the first {len(scene.drawn)} samples the {len(order)} nearest to a training picture, "
        f"each above its neighbours among {found.num:,}, by the {scene.ruler.what}; of all samples "
        f"{found.distances[:, 0].median():.2f} at the median"
    )
    if usual is not None:
        caption += f", of held-out pictures {usual:.2f}"
    caption += scene.ruler.caution
    left = ["sample", "nearest", *[f"{k + 1}." for k in range(1, found.numbers.shape[1])]]
    return Look((Sheet(torch.cat(rows).numpy(), len(order), labels, left),), caption + ".")


@torch.no_grad()
def reconstructions(scene: Scene) -> Look:
    """Real pictures above what their encoding decodes to."""
    split = "val" if scene.data.num_samples("val") else scene.family.config.data.split
    numbers = np.linspace(0, scene.data.num_samples(split) - 1, NUM_ENCODED).astype(int)
    images = real_pictures(scene.data, numbers.tolist(), split, scene.resolution)
    batch = {
        "image": images.to(scene.family.device),
        "position": torch.from_numpy(numbers),
        "key": [str(number) for number in numbers],
    }
    found = scene.family.reconstruct(scene.networks, batch)
    if found is None:
        raise LeftOut("this family encodes no pictures")
    both = torch.cat([images, found.cpu()])
    caption = f"Pictures of split {split} above their reconstructions."
    sheet = Sheet(both.numpy(), NUM_ENCODED, left=["real", "decoded"])
    return Look((sheet,), caption)
