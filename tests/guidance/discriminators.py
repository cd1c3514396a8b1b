"""Kinds of tiny discriminators, random images for them, and the logits of their heads by hand."""

import torch

from dinogen.features.pyramid import to_guide

SIDE = 32
PENALTIES = {"r1": 3.0, "r2": 5.0}
KINDS = {
    "whole": {"grid": 3, "head_channels": 8},
    "crop": {"crop": 28, "head_channels": 8},
    "patch": {"kind": "patch", "patch_scales": 2, "patch_layers": 1, "patch_channels": 8},
    "patch_crop": {
        "kind": "patch",
        "crop": 20,
        "patch_scales": 2,
        "patch_layers": 1,
        "patch_channels": 8,
    },
}


def random_images(num=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(num, 3, SIDE, SIDE, generator=generator) * 2 - 1


def logits_by_hand(adversary, guide, images):
    maps = guide(to_guide(images, 3 * 14))
    return [
        head(x)
        for head, x in zip(adversary.network.heads, (maps[:, :24], maps[:, 24:]), strict=True)
    ]
