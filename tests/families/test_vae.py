"""The VAE family: its loss against torch.distributions, and that it learns what it is shown."""

import logging

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from dinogen.config import ConfigError, parse_config
from dinogen.distributed import rng
from dinogen.families.registry import family_options
from tests.families.vae_helpers import batch_of, build, drawn_images, means, train

NUM_VALUES = 3 * 16 * 16


SPATIAL = "family.latent_side=4"
both = pytest.mark.parametrize("shape", [(), (SPATIAL,)], ids=["vector", "spatial"])


def by_hand(family, batch, purpose):
    """Reconstructions, log p(x | z) and KL of each sample, by torch.distributions."""
    G = family.G
    mean, log_variance = G.encode(batch["image"])
    size = (8, 4, 4) if family.options.latent_side else (8,)
    noise = rng.normal(family.config.seed, purpose, batch["position"], size)
    q = Normal(mean, torch.exp(log_variance / 2))
    x = G.decode(q.loc + q.scale * noise)
    likelihood = Normal(x, 1.0).log_prob(batch["image"]).sum((1, 2, 3))
    kl = kl_divergence(q, Normal(torch.zeros(size), torch.ones(size))).flatten(1).sum(1)
    return x, likelihood, kl


@both
def test_at_beta_1_the_loss_is_the_negative_elbo_per_value_up_to_the_gaussian_s_constant(shape):
    family = build("vae", *shape)
    batch = batch_of(drawn_images(4), start=100)
    (phase,) = family.phases
    losses, report = phase.losses(batch)
    x, likelihood, kl = by_hand(family, batch, "z")
    constant = 0.5 * torch.log(torch.tensor(2 * torch.pi))
    elbo = (likelihood - kl).mean() / NUM_VALUES
    torch.testing.assert_close(sum(losses.values()), -elbo - constant)
    assert losses.keys() == {"reconstruction", "kl"}
    mse = (x - batch["image"]).square().mean((1, 2, 3))
    assert means(report) == pytest.approx(
        {
            "mse": mse.mean().item(),
            "kl_nats": kl.mean().item(),
            "psnr": (10 * torch.log10(4 / mse)).mean().item(),
        }
    )


def test_beta_weighs_the_kl_alone():
    one, three = (build("vae", f"family.beta={beta}") for beta in (1, 3))
    batch = batch_of(drawn_images(4))
    first, second = (means(f.phases[0].losses(batch)[0]) for f in (one, three))
    assert second["kl"] == pytest.approx(3 * first["kl"])
    assert second["reconstruction"] == first["reconstruction"]


@both
def test_the_loss_does_not_depend_on_how_a_batch_is_cut(shape):
    family = build("vae", *shape)
    images = drawn_images(6)
    (phase,) = family.phases
    whole = means(phase.losses(batch_of(images))[0])
    parts = [means(phase.losses(batch_of(images[i : i + 2], i))[0]) for i in (0, 2, 4)]
    for name, value in whole.items():
        assert sum(part[name] for part in parts) / 3 == pytest.approx(value, rel=1e-5)


@both
def test_it_overfits_eight_images(shape):
    """The squared error falls below an eighth of that of the mean image."""
    family = build("vae", "family.beta=0.01", *shape)
    images = drawn_images()
    spread = (images - images.mean(0)).square().mean().item()
    train(family, images, num_steps=75)
    found = means(family.held_out(family.networks, batch_of(images)))
    assert found["mse"] < spread / 8
    assert found["psnr"] > 20


def test_a_sample_depends_on_its_index_and_the_seed_alone():
    family = build("vae")
    with torch.no_grad():
        images = family.sample(family.networks, torch.arange(6), seed=3)
        again = family.sample(family.networks, torch.tensor([4, 1]), seed=3)
        other = family.sample(family.networks, torch.arange(6), seed=4)
    assert images.shape == (6, 3, 16, 16) and images.abs().max() <= 1
    torch.testing.assert_close(again, images[[4, 1]])
    assert not torch.allclose(other, images, atol=1e-3)
    z = rng.normal(3, "sample", torch.arange(6), (8,))
    torch.testing.assert_close(images, family.G.decode(z))


def test_a_spatial_latent_is_that_of_its_image():
    """Sampled, inverted and decoded; and it is exported with its side."""
    family = build("vae", SPATIAL)
    assert family.arguments("G")["latent_side"] == 4
    assert "latent_side" not in build("vae").arguments("G")
    indices = torch.tensor([5, 1])
    with torch.no_grad():
        z = family.latents(indices, seed=3)
        assert torch.equal(z, rng.normal(3, "sample", indices, (8, 4, 4)))
        images = family.sample(family.networks, indices, seed=3)
        torch.testing.assert_close(images, family.G.decode(z))
        mean = family.invert(family.networks, images, indices)
        assert torch.equal(mean, family.G.encode(images)[0]) and mean.shape == z.shape
        found = family.reconstruct(family.networks, batch_of(images))
        torch.testing.assert_close(found, family.G.decode(mean))
    assert family.first_layer(family.networks) is None


@pytest.mark.parametrize("side", [1, 2, 5, 16])
def test_a_side_that_the_resolution_does_not_have_is_refused(side):
    with pytest.raises(ConfigError, match=rf"family\.latent_side: {side}: .* it can be 4, 8, or 0"):
        build("vae", f"family.latent_side={side}")


def test_held_out_is_the_loss_of_the_given_networks_under_noise_of_its_own():
    family, averaged = build("vae"), build("vae", "seed=1")
    torch.manual_seed(1)
    for parameter in averaged.G.parameters():
        parameter.data.add_(0.01 * torch.randn_like(parameter))
    batch = batch_of(drawn_images(4))
    found = means(family.held_out(averaged.networks, batch))
    averaged.config = family.config
    x, _, kl = by_hand(averaged, batch, "z/held-out")
    mse = (x - batch["image"]).square().mean()
    loss = 0.5 * mse + kl.mean() / NUM_VALUES
    assert found["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert found["mse"] == pytest.approx(mse.item(), rel=1e-5)
    assert found["loss"] != pytest.approx(sum(means(family._losses(batch)[0]).values()), rel=1e-5)


def test_the_perceptual_term_is_lambda_times_the_distance_of_vgg_s_maps(caplog):
    family = build("vae", "family.lambda_perceptual=0.3", "family.perceptual_weights=random")
    assert build("vae").describe() == {}
    with caplog.at_level(logging.WARNING):
        family.begin(None)
    assert "RANDOM" in caplog.text
    facts = family.describe()
    assert facts["random_guide"] and "RANDOM" in facts["guide_label"]

    batch = batch_of(drawn_images(4))
    losses, _ = family.phases[0].losses(batch)
    x, _, _ = by_hand(family, batch, "z")
    pairs = zip(family.vgg(x), family.vgg(batch["image"]), strict=True)
    distance = sum((a - b).square().mean() for a, b in pairs)
    torch.testing.assert_close(losses["perceptual"], 0.3 * distance)
    losses["perceptual"].backward()
    assert all(p.grad is not None for p in family.G.parameters())
    assert all(p.grad is None for p in family.vgg.parameters())
    found = means(family.held_out(family.networks, batch))
    plain = means(build("vae").held_out(family.networks, batch))
    assert found["loss"] > plain["loss"] and found["mse"] == plain["mse"]


def test_weights_that_are_not_there_are_one_error_before_training():
    family = build("vae", "family.lambda_perceptual=0.1", "family.perceptual_weights=gone.pth")
    with pytest.raises(ConfigError, match=r"^family\.perceptual_weights: gone\.pth is not a file"):
        family.begin(None)
    build("vae", "family.perceptual_weights=gone.pth").begin(None)  # lambda 0 asks for none


@pytest.mark.parametrize("resolution", [8, 512])
def test_a_resolution_it_cannot_do_is_refused(resolution):
    with pytest.raises(ConfigError, match=f"resolution {resolution}"):
        build("vae", resolution=resolution)


@pytest.mark.parametrize(
    "option", ["beta=-1", "latent=0", "base_channels=12", "lambda_perceptual=-0.1"]
)
def test_options_out_of_range_are_refused_by_name(option):
    name = option.partition("=")[0]
    config = parse_config({"family": {"name": "vae"}}, [f"family.{option}"])
    with pytest.raises(ConfigError, match=rf"family: {name}: "):
        family_options(config)
