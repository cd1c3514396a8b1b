"""FID-768 and KID-768 of real images: noise is worse than none, more is worse, cats are worst."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from dinogen.config.training import MetricsConfig
from dinogen.metrics.collect import collect
from dinogen.metrics.frechet import frechet_of
from dinogen.metrics.kernel import kernel_distance
from dinogen.metrics.suite import load_extractor

NUM, SIDE = 20, 64


class Given:
    """Images (N, 3, R, R) uint8 that are all there."""

    def __init__(self, images) -> None:
        self.num, self.images = len(images), images

    def read(self, numbers):
        return self.images[numbers]


def squares(folder, start, step=1):
    """The middle of some photos, shrunk by area."""
    found = []
    for file in sorted(folder.glob("*.jpg"))[start::step][:NUM]:
        with Image.open(file) as photo:
            side = min(photo.size)
            left, top = (photo.width - side) // 2, (photo.height - side) // 2
            square = photo.convert("RGB").crop((left, top, left + side, top + side))
            found.append(np.array(square.resize((SIDE, SIDE), Image.Resampling.BOX)))
    return torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2)


def noisy(images, sigma):
    """With normal noise, of pixels in [-1, 1]."""
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    return (images + sigma * 127.5 * noise).round().clamp(0, 255).to(torch.uint8)


def test_values_grow_with_the_noise_and_most_for_cats(assets):
    (file,) = (assets / "inception").glob("*.safetensors")
    extractor = load_extractor(
        "inception768", MetricsConfig(inception768=str(file)), torch.device("cpu")
    )
    ours, others = squares(assets / "faces", 0, 2), squares(assets / "faces", 1, 2)
    sets = [others, ours, noisy(ours, 0.05), noisy(ours, 0.2), squares(assets / "cats", 0)]
    reference, *rest = [
        collect(Given(images), [extractor], {"inception768"}, 16).seen["inception768"]
        for images in sets
    ]
    assert reference.moments.count == NUM
    fid = [frechet_of(seen.moments, reference.moments) for seen in rest]
    kid = [kernel_distance(seen.features, reference.features).value for seen in rest]
    assert fid == sorted(fid) and kid == sorted(kid)
    assert kid[-1] > 5 * kid[0] and fid[-1] > 2 * fid[0]
    assert abs(frechet_of(reference.moments, reference.moments)) < 1e-9
