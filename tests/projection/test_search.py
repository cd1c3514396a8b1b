"""A latent that is known is found again, in every space; and what the search is made of."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch.nn import functional as F

from dinogen.distributed import rng
from dinogen.errors import UserError
from dinogen.families.abilities import Inverts, decode_in, spaces_of, to_space
from dinogen.families.registry import family_class, family_names
from dinogen.projection.loss import Loss
from dinogen.projection.search import Searcher, correlation, normalize_noise, ramp
from tests.families.tiny import tiny_config

PIXELS = Loss("pixels", "pixels alone", None)
DENOISERS = ["ddpm", "ddpm-edm", "ddpm-dit", "flow", "flow-dit"]
SPACES = [
    (name, space)
    for name in family_names()
    if name not in ("ddpm", "flow")
    for space in (("z", "w", "w+") if name == "stylegan2_ada" else ("z",))
]


def built(name, tmp_path):
    """An untrained family, its networks as they are sampled."""
    config = tiny_config(name, tmp_path / "data", tmp_path / "run")
    with rng.torch_seed(3, "test"):
        family = family_class(config.family)(config, config.stages[0], torch.device("cpu"))
    networks = {k: v.eval().requires_grad_(False) for k, v in family.networks.items()}
    if name == "dcgan":  # the running statistics of batch norm
        networks["G"].train()
        for first in range(0, 1600, 32):
            networks["G"](family.latents(torch.arange(first, first + 32), 9))
        networks["G"].eval()
    if name == "stylegan2_ada":
        z = family.latents(torch.arange(64), 9)
        networks["G"].w_avg.copy_(networks["G"].mapping(z).mean(0))
    return family, networks


def searcher(family, networks, space, steps=200, restarts=4):
    one = spaces_of(family)[space]
    return Searcher(family, networks, one, PIXELS, 0, 0, steps, restarts)


@pytest.mark.parametrize(("name", "space"), SPACES)
def test_a_known_latent_is_found_again(name, space, tmp_path):
    family, networks = built(name, tmp_path)
    index = torch.tensor([1000])
    latents = to_space(family, networks, space, family.latents(index, 77), index)
    image = decode_in(family, networks, space, latents, index)
    others = family.sample(networks, torch.arange(32), 1)
    start = (others.mean(0) - image).square().mean()
    found = searcher(family, networks, space).search(image, torch.tensor([5]))
    again = decode_in(family, networks, space, found.latents, index, found.noise)
    assert (again - image).square().mean() < 0.05 * start
    assert found.errors.shape == (200, 1)
    assert found.latents.shape == (1, *spaces_of(family)[space].shape)


@pytest.mark.parametrize("name", DENOISERS)
def test_a_diffusion_model_cannot_be_searched(name, tmp_path):
    family, networks = built(name, tmp_path)
    image = torch.zeros(1, 3, 16, 16)
    with pytest.raises(UserError, match="no gradient reaches its latents"):
        searcher(family, networks, "z", 2, 1).search(image, torch.tensor([0]))


@pytest.mark.parametrize("name", ["vae", "vae-spatial", "vae_gan", *DENOISERS])
def test_who_inverts(name, tmp_path):
    family, networks = built(name, tmp_path)
    assert isinstance(family, Inverts)
    index = torch.tensor([4])
    images = family.sample(networks, index, 0)
    z = family.invert(networks, images, index)
    assert z.shape == family.latents(index, 0).shape
    if name in DENOISERS:
        steps = family.options.sample_steps
        assert not family.refines and f"backwards in {steps} steps" in family.inverts_by
        again = family.decode(networks, z, index, 0)
        torch.testing.assert_close(again, images, rtol=0, atol=2e-2)
    if name == "ddpm":
        options = family.options.model_copy(update={"sampler": "ddpm"})
        family.options = options
        with pytest.raises(UserError, match="sample with ddim"):
            family.invert(networks, images, index)
    if name not in DENOISERS:
        assert torch.equal(z, networks["G"].encode(images)[0])


def test_images_are_searched_each_for_itself(tmp_path):
    family, networks = built("dcgan", tmp_path)
    images = family.sample(networks, torch.arange(900, 903), 1)
    positions = torch.tensor([11, 12, 13])
    own = searcher(family, networks, "z", 10, 2)
    together = own.search(images, positions)
    alone = [own.search(images[n : n + 1], positions[n : n + 1]) for n in range(3)]
    found = torch.cat([one.latents for one in alone])
    assert torch.allclose(together.latents, found, atol=1e-3)
    again = own.search(images, positions)
    assert torch.equal(again.latents, together.latents)
    other = dataclasses.replace(own, seed=1).search(images, positions)
    assert not torch.equal(other.latents, together.latents)


def test_latents_in_z_stay_as_long_as_samples(tmp_path):
    """Of an image that no latent makes: the search would otherwise go far away."""
    family, networks = built("dcgan", tmp_path)
    found = searcher(family, networks, "z", 300, 2).search(
        torch.full((1, 3, 16, 16), 1.0), torch.tensor([0])
    )
    assert found.latents.square().mean() < 1.5


def test_a_start_is_refined(tmp_path):
    family, networks = built("vae", tmp_path)
    image = family.sample(networks, torch.tensor([3]), 0)
    start = family.invert(networks, image, torch.tensor([0]))
    found = searcher(family, networks, "z", 60).search(image, torch.tensor([0]), start)
    before = (decode_in(family, networks, "z", start, torch.tensor([0])) - image).square().mean()
    after = (found.frames[-1] - image).square().mean()
    assert after < 0.5 * before
    assert math.isclose(float(found.errors[0, 0]), 10 * float(before), rel_tol=1e-3)


def test_the_mean_and_spread_are_those_of_w(tmp_path):
    family, networks = built("stylegan2_ada", tmp_path)
    z = family.latents(torch.arange(10_000), 0)
    w = networks["G"].mapping(z)
    for space in ("w", "w+"):
        mean, deviation = searcher(family, networks, space).statistics
        rows = mean.expand(*spaces_of(family)[space].shape).reshape(-1, w.shape[1])
        assert (rows - w.mean(0)).abs().max() < 1e-5
        expected = ((w - w.mean(0)).square().sum() / len(w)).sqrt()
        assert deviation == pytest.approx(float(expected), rel=1e-4)


def test_the_rate_goes_up_and_down():
    assert ramp(0) == 0
    assert ramp(0.025) == pytest.approx(0.5)
    assert ramp(0.5) == 1
    assert ramp(0.875) == pytest.approx(0.5)
    assert ramp(1) == 0


def test_noise_is_kept_uncorrelated_and_normal():
    """Against the loops of the definition, map by map."""
    sides = (4, 8, 16)
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(2, sum(side**2 for side in sides), generator=generator)
    expected = []
    for row in noise:
        total, first = 0.0, 0
        for side in sides:
            level = row[first : first + side**2].view(1, 1, side, side)
            first += side**2
            while True:
                n = level.shape[-1]
                for dy, dx in ((1, 0), (0, 1)):
                    products = [
                        float(level[0, 0, y, x] * level[0, 0, (y - dy) % n, (x - dx) % n])
                        for y in range(n)
                        for x in range(n)
                    ]
                    total += (sum(products) / n**2) ** 2
                if n <= 8:
                    break
                level = F.avg_pool2d(level, 2)
        expected.append(total)
    assert torch.allclose(correlation(noise, sides), torch.tensor(expected), rtol=1e-4)
    normalize_noise(noise, sides)
    for part in noise.split([side**2 for side in sides], 1):
        assert part.mean(1).abs().max() < 1e-5
        assert torch.allclose(part.var(1, correction=0), torch.ones(2), atol=1e-4)
