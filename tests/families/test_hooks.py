"""What there is to look at in every family: latents, decoding, opinions, directions, styles."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from dinogen.diffusion.process import sample as walk
from dinogen.distributed import rng
from dinogen.families.abilities import (
    FollowsSteps,
    HasCritic,
    HasFirstLayer,
    MixesStyles,
    Reconstructs,
    num_classes_of,
    truncates,
)
from dinogen.families.denoiser import Denoiser
from dinogen.families.registry import family_class, resolve
from tests.families.gans import Training, drawn_images
from tests.families.stored_latents import make_autoencoder
from tests.families.tiny import RESOLUTION, TINY, tiny_config

CPU = torch.device("cpu")
NUMBERS = torch.tensor([0, 1, 7, 2**33])
SEED = 3
every_family = pytest.mark.parametrize("name", TINY)
EARLIER = {name for name in TINY if "-" not in name} - {"flow"}
WITH_D = ["dcgan", "progressive_gan", "sagan", "stylegan2_ada", "vae_gan", "wgan_gp"]


def build(name, *overrides):
    """A tiny family whose weights are away from what is zero at the start."""
    config = resolve(tiny_config(name, Path("no_data"), Path("no_run"), *overrides))
    with rng.torch_seed(0, "init"):
        family = family_class(config.family)(config, config.stages[0], CPU)
    if isinstance(family, Denoiser) and family.latent is not None:
        family.latent._autoencoder = make_autoencoder()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for network in family.networks.values():
            network.eval()
            for tensor in [*network.parameters(), *network.buffers()]:
                if tensor.is_floating_point() and tensor.ndim:
                    tensor += 0.02 * torch.randn(tensor.shape, generator=generator).abs()
    return family


def as_it_was(family):
    """Samples by the words in which each family had them before latents had a name."""
    name, G = family.config.family.name, family.networks["G"]
    if name == "ddpm":
        shape = (3, RESOLUTION, RESOLUTION)

        def noise(t):
            return rng.normal(SEED, f"sample/{t}", NUMBERS, shape)

        start = rng.normal(SEED, "sample", NUMBERS, shape)
        eta = {"ddim": 0.0, "ddpm": 1.0}[family.options.sampler]
        steps, kind = TINY["ddpm"]["sample_steps"], family.options.prediction
        return walk(
            lambda x, t: G(x, t, None), family.schedule, kind, start, steps, eta=eta, noise=noise
        )
    z = rng.normal(SEED, "sample", NUMBERS, (8,))
    if name == "stylegan2_ada":
        return G(z, None, psi=family.options.truncation).clamp(-1, 1)
    return G(z)


CASES = [(name, ()) for name in TINY]
CASES += [("ddpm", ("family.sampler=ddpm",)), ("stylegan2_ada", ("family.truncation=0.6",))]


@pytest.mark.parametrize(("name", "overrides"), CASES, ids=str)
@torch.no_grad()
def test_samples_are_decoded_latents_and_bitwise_what_they_were(name, overrides):
    family = build(name, *overrides)
    networks = {name: family.networks[name] for name in family.ema_networks}
    found = family.sample(networks, NUMBERS, SEED)
    assert found.dtype == torch.float32 and found.shape == (4, 3, RESOLUTION, RESOLUTION)
    latents = family.latents(NUMBERS, SEED)
    assert torch.equal(family.decode(networks, latents, NUMBERS, SEED), found)
    assert torch.equal(family.decode(networks, latents, NUMBERS, SEED, psi=1.0), found)
    if name in EARLIER:
        assert torch.equal(found, as_it_was(family))
    assert not torch.equal(family.latents(NUMBERS, SEED + 1), latents)


@every_family
@torch.no_grad()
def test_a_image_follows_from_its_latent(name):
    family = build(name)
    latents = family.latents(NUMBERS, SEED)
    between = torch.lerp(latents[:1], latents[1:2], 0.5)
    images = family.decode(family.networks, torch.cat([latents, between]), NUMBERS[[0] * 5], SEED)
    of_one_class = NUMBERS * max(num_classes_of(family), 1)
    assert images.min() >= -1 and images.max() <= 1
    expected = family.decode(family.networks, latents, of_one_class, SEED)
    torch.testing.assert_close(images[:4], expected, rtol=1e-4, atol=1e-4)
    for end in images[:2]:
        assert (images[4] - end).abs().max() > 1e-4


@every_family
@torch.no_grad()
def test_psi_moves_those_alone_that_truncate(name):
    family = build(name)
    latents = family.latents(NUMBERS, SEED)
    whole, half, none = (
        family.decode(family.networks, latents, NUMBERS, SEED, psi=psi) for psi in (1.0, 0.5, 0.0)
    )
    assert truncates(family) == (name == "stylegan2_ada")
    if not truncates(family):
        assert torch.equal(half, whole)
        return
    G = family.networks["G"]
    mean = G.synthesis(G.broadcast(G.w_avg[None])).clamp(-1, 1)
    torch.testing.assert_close(none, mean.expand_as(none))
    assert (half - none).abs().max() > 1e-3 and (half - whole).abs().max() > 1e-3
    truncated = build(name, "family.truncation=0.5").sample(family.networks, NUMBERS, SEED)
    torch.testing.assert_close(truncated, half)


@every_family
@torch.no_grad()
def test_autoencoders_decode_the_mean_of_the_posterior(name):
    family = build(name)
    images = drawn_images(5, RESOLUTION)
    batch = {"image": images, "position": torch.arange(5), "key": list("abcde")}
    assert isinstance(family, Reconstructs) == name.startswith("vae")
    if not isinstance(family, Reconstructs):
        return
    found = family.reconstruct(family.networks, batch)
    G = family.networks["G"]
    expected = G.decode(G.encode(images)[0])
    assert torch.equal(found, expected)
    moved = family.reconstruct(family.networks, batch | {"position": torch.arange(5) + 9})
    assert torch.equal(moved, found), "no draw takes part"
    with pytest.raises(AssertionError):
        torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("name", sorted(set(TINY) - set(WITH_D)))
def test_without_a_discriminator_there_is_no_opinion(name):
    family = build(name)
    if isinstance(family, HasCritic):  # some stages of this family have one, this one has not
        assert name.startswith("guided") and family.realism(drawn_images(2, RESOLUTION)) is None


@pytest.mark.parametrize("name", WITH_D)
def test_a_trained_discriminator_finds_real_images_more_real(name):
    family = build(name)
    family.D.train()
    real = drawn_images(8, RESOLUTION)
    with torch.no_grad():
        fake = family.sample(family.networks, torch.arange(8), SEED)
    before = copy.deepcopy(family.D.state_dict())
    first = family.realism(torch.cat([real, fake]))
    assert first.shape == (16,) and first.dtype == torch.float32 and not first.requires_grad
    torch.testing.assert_close(family.realism(fake[[5, 2]]), first[[13, 10]], rtol=1e-4, atol=1e-5)
    assert family.D.training
    for key, value in family.D.state_dict().items():
        assert torch.equal(value, before[key]), f"{key} moved"

    training = Training(family)
    for step in range(20):
        batch = {
            "image": real,
            "position": torch.arange(8 * step, 8 * step + 8),
            "key": [str(i) for i in range(8)],
        }
        for phase in family.phases:
            if phase.network == "D" and phase.due(step):
                training.update(phase, batch)
        if isinstance(family, FollowsSteps):
            family.after_step(0)
    after = family.realism(torch.cat([real, fake]))
    assert after[:8].mean() > after[8:].mean()


def test_a_discriminator_of_classes_takes_the_one_that_fits_best():
    family = build("stylegan2_ada", "family.num_classes=3")
    images = drawn_images(4, RESOLUTION)
    with torch.no_grad():
        each = [family.D(images[i : i + 1], torch.tensor([k])) for i in range(4) for k in range(3)]
    expected = torch.cat(each).view(4, 3).amax(1)
    torch.testing.assert_close(family.realism(images), expected)


@every_family
@torch.no_grad()
def test_what_the_first_layer_cannot_see_changes_no_image(name):
    family = build(name)
    assert isinstance(family, HasFirstLayer) == (not isinstance(family, Denoiser))
    if not isinstance(family, HasFirstLayer):
        return
    matrix = family.first_layer(family.networks)
    if name in ("vae-spatial", "guided-dit"):
        assert matrix is None
        return
    latents = family.latents(NUMBERS, SEED)
    assert matrix.ndim == 2 and matrix.shape[1] == latents.shape[1] == 8
    u = torch.nn.functional.normalize(torch.arange(1.0, 9.0), dim=0)
    mirrored = latents - 2 * (latents @ u)[:, None] * u  # as long as before: mappings normalise
    both = torch.cat([latents, mirrored])
    numbers = torch.cat([NUMBERS, NUMBERS])
    images = family.decode(family.networks, both, numbers, SEED)
    assert (images[:4] - images[4:]).abs().amax((1, 2, 3)).min() > 1e-3
    matrix -= (matrix @ u)[:, None] * u  # a view of the weights
    images = family.decode(family.networks, both, numbers, SEED)
    torch.testing.assert_close(images[:4], images[4:], rtol=1e-4, atol=1e-4)


@every_family
@torch.no_grad()
def test_styles_are_mixed_by_resolution(name):
    family = build(name)
    latents = family.latents(NUMBERS, SEED)
    coarse, fine = latents[:2], latents[2:]
    assert isinstance(family, MixesStyles) == (name == "stylegan2_ada")
    if not isinstance(family, MixesStyles):
        return
    mixed = family.mix(family.networks, coarse, fine, NUMBERS[:2], SEED)
    seen = []
    block = family.networks["G"].synthesis.blocks["4"]
    block.register_forward_hook(lambda module, inputs, output: seen.append(output[0]))
    of_coarse = family.decode(family.networks, coarse, NUMBERS[:2], SEED)
    of_fine = family.decode(family.networks, fine, NUMBERS[:2], SEED)
    assert torch.equal(family.mix(family.networks, coarse, fine, NUMBERS[:2], SEED), mixed)
    torch.testing.assert_close(seen[2], seen[0])
    assert (seen[2] - seen[1]).abs().max() > 1e-3
    assert (mixed - of_coarse).abs().max() > 1e-3 and (mixed - of_fine).abs().max() > 1e-3
    alike = family.mix(family.networks, coarse, coarse, NUMBERS[:2], SEED)
    torch.testing.assert_close(alike, of_coarse)
