"""The VAE-GAN family: both phases by hand, what each changes, and that it learns."""

import pytest
import torch

from dinogen.config import ConfigError, parse_config
from dinogen.distributed import rng
from dinogen.families.registry import family_options
from dinogen.training.engines import make_engine
from tests.families.vae_helpers import CPU, batch_of, build, drawn_images, means, train


def noise(family, purpose, batch):
    return rng.normal(family.config.seed, purpose, batch["position"], (8,))


def fakes_by_hand(family, batch, which):
    """Reconstructions under noise of the phase, and images of the prior."""
    mean, log_variance = family.G.encode(batch["image"])
    z = mean + torch.exp(log_variance / 2) * noise(family, f"z/{which}", batch)
    return family.G.decode(z), family.G.decode(noise(family, f"prior/{which}", batch))


def test_d_s_loss_is_the_hinge_over_reconstructions_and_prior_in_equal_parts():
    family = build("vae_gan")
    batch = batch_of(drawn_images(4), start=50)
    d_phase, _ = family.phases
    losses, report = d_phase.losses(batch)
    reconstructions, prior = fakes_by_hand(family, batch, "D")
    real, *fakes = (family.D(x) for x in (batch["image"], reconstructions, prior))
    hinge = (1 - real).clamp(min=0).mean()
    hinge = hinge + sum((1 + fake).clamp(min=0).mean() / 2 for fake in fakes)
    torch.testing.assert_close(sum(losses.values()), hinge)
    assert report["real"].item() == pytest.approx(real.mean().item(), abs=1e-6)
    assert report["fake"].item() == pytest.approx(torch.cat(fakes).mean().item(), abs=1e-6)


def test_g_s_loss_is_that_of_the_vae_plus_lambda_times_the_hinge():
    family = build("vae_gan", "family.lambda_adv=0.7", "family.beta=0.2")
    batch = batch_of(drawn_images(4), start=50)
    _, g_phase = family.phases
    losses, _ = g_phase.losses(batch)
    reconstructions, prior = fakes_by_hand(family, batch, "G")
    adversarial = -0.5 * (family.D(reconstructions).mean() + family.D(prior).mean())
    torch.testing.assert_close(losses.pop("adversarial"), 0.7 * adversarial)

    mean, log_variance = family.G.encode(batch["image"])
    kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1).mean()
    mse = (reconstructions - batch["image"]).square().mean()
    expected = {"reconstruction": mse, "kl": 0.2 * kl}
    assert means(losses) == pytest.approx(means(expected), rel=1e-4)


def test_each_phase_changes_exactly_its_network():
    family = build("vae_gan")
    engine = make_engine(family.config, family, 1e-3, CPU)
    engine.prepare()
    for phase, other in zip(family.phases, ("G", "D"), strict=True):
        before = {
            name: {key: p.detach().clone() for key, p in network.named_parameters()}
            for name, network in family.networks.items()
        }
        losses, _ = engine.losses(phase, batch_of(drawn_images()), last=True)
        engine.backward(phase, losses, 1.0)
        assert engine.step(phase).applied
        # while all logits are within the hinge's margins, D's last bias has a gradient of zero
        for key, p in family.networks[phase.network].named_parameters():
            assert key == "layers.8.bias" or not torch.equal(p, before[phase.network][key]), key
        for key, p in family.networks[other].named_parameters():
            assert torch.equal(p, before[other][key]), key
            assert p.grad is None


def test_losses_do_not_depend_on_how_a_batch_is_cut():
    family = build("vae_gan")
    images = drawn_images(6)
    for phase in family.phases:
        whole = means(phase.losses(batch_of(images))[0])
        parts = [means(phase.losses(batch_of(images[i : i + 2], i))[0]) for i in (0, 2, 4)]
        for name, value in whole.items():
            assert sum(part[name] for part in parts) / 3 == pytest.approx(value, rel=1e-4)


def test_it_overfits_eight_images():
    """The squared error falls below a fifth of that of the mean image, D at work all the time."""
    family = build("vae_gan", "family.lambda_adv=0.01", "optim.lr_scale={D: 0.1}")
    images = drawn_images()
    spread = (images - images.mean(0)).square().mean().item()
    train(family, images, num_steps=60)
    assert means(family.held_out(family.networks, batch_of(images)))["mse"] < spread / 5


def test_d_learns_to_tell_real_from_fake():
    family = build("vae_gan", "family.lambda_adv=0")
    images = drawn_images()
    phase = family.phases[0]
    before = means(phase.losses(batch_of(images))[1])
    engine = make_engine(family.config, family, 1e-3, CPU)
    engine.prepare()
    for step in range(30):
        losses, _ = engine.losses(phase, batch_of(images, 8 * step), last=True)
        engine.backward(phase, losses, 1.0)
        engine.step(phase)
    after = means(phase.losses(batch_of(images))[1])
    assert after["real"] - after["fake"] > before["real"] - before["fake"] + 1


def test_a_sample_depends_on_its_index_and_the_seed_alone():
    family = build("vae_gan")
    with torch.no_grad():
        images = family.sample(family.networks, torch.arange(6), seed=3)
        again = family.sample({"G": family.G}, torch.tensor([4, 1]), seed=3)
    torch.testing.assert_close(again, images[[4, 1]])
    z = rng.normal(3, "sample", torch.arange(6), (8,))
    torch.testing.assert_close(images, family.G.decode(z))


def test_networks_are_rebuilt_from_their_arguments():
    family = build("vae_gan")
    for name, network in family.networks.items():
        again = type(network)(**family.arguments(name))
        again.load_state_dict(network.state_dict())
    assert list(family.ema_networks) == ["G"]


def test_more_halvings_than_pixels_are_refused():
    with pytest.raises(ConfigError, match=r"family\.d_layers: 3 .* 16x16"):
        build("vae_gan", "family.d_layers=3")


@pytest.mark.parametrize("option", ["lambda_adv=-1", "d_layers=0", "d_channels=12"])
def test_options_out_of_range_are_refused_by_name(option):
    name = option.partition("=")[0]
    config = parse_config({"family": {"name": "vae_gan"}}, [f"family.{option}"])
    with pytest.raises(ConfigError, match=rf"family: {name}: "):
        family_options(config)
