"""WGAN-GP as a family: critic and generator in their rhythm, and that it learns eight images."""

import pytest
import torch

from dinogen.config import ConfigError
from dinogen.distributed import rng
from tests.families.gans import (
    Training,
    drawn_images,
    energy_distance,
    make_batch,
    make_family,
)

SMALL = ("family.z_dim=8", "family.channels=4", "family.channel_max=8")
LEARNS = ("family.z_dim=8", "family.channels=8", "family.channel_max=16")
LEARNS += ("optim.betas=[0.0, 0.9]", "stages.0.lr=2.0e-3", "stages.0.batch=8")


@pytest.mark.parametrize("n_critic", [1, 2, 5])
def test_g_has_a_turn_in_every_n_th_step(n_critic):
    family = make_family("wgan_gp", 16, *SMALL, f"family.n_critic={n_critic}")
    turns = [[p.name for p in family.phases if p.due(step)] for step in range(10)]
    assert turns == [["D", "G"] if step % n_critic == 0 else ["D"] for step in range(10)]


def test_the_critic_s_losses_by_hand():
    family = make_family("wgan_gp", 16, *SMALL, "family.gp_weight=7", "seed=5")
    batch = make_batch(drawn_images(8, 16))
    family.G.requires_grad_(False)
    losses, report = family.phases[0].losses(batch)

    z = rng.normal(5, "z/D", batch["position"], (8,))
    real, fake = batch["image"], family.G(z)
    torch.testing.assert_close(losses["wasserstein"], family.D(fake).mean() - family.D(real).mean())
    torch.testing.assert_close(report["real"] - report["fake"], -losses["wasserstein"])
    eps = rng.uniform(5, "eps/D", batch["position"], (1, 1, 1))
    between = (eps * real + (1 - eps) * fake).requires_grad_()
    norms = []
    for i in range(8):  # one image at a time
        score = family.D(between[i : i + 1]).sum()
        norms.append(torch.autograd.grad(score, between)[0][i].norm())
    expected = 7 * (torch.stack(norms) - 1).square().mean()
    torch.testing.assert_close(losses["penalty"], expected, rtol=1e-4, atol=1e-6)


def test_the_generator_s_loss_by_hand():
    family, batch = make_family("wgan_gp", 16, *SMALL), make_batch(drawn_images(8, 16))
    loss = family.phases[1].losses(batch)[0]["wasserstein"]
    z = rng.normal(0, "z/G", batch["position"], (8,))
    torch.testing.assert_close(loss, -family.D(family.G(z)).mean())


def test_a_resolution_out_of_range_is_a_clear_error():
    with pytest.raises(ConfigError, match="stages: wgan_gp makes images from 8 pixels, not 4"):
        make_family("wgan_gp", 4)


def test_it_learns_eight_images():
    images = drawn_images(8, 16)
    family = make_family("wgan_gp", 16, *LEARNS)
    training = Training(family)
    before = energy_distance(training.samples(64), images)
    training.run(images, 150)
    assert energy_distance(training.samples(64), images) < before / 4
