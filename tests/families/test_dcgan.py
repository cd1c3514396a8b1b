"""DCGAN as a family: its phases, its losses, and that it learns eight images."""

import pytest
import torch
from torch.nn import functional as F

from dinogen.config import ConfigError
from tests.families.gans import (
    Training,
    drawn_images,
    energy_distance,
    make_batch,
    make_family,
)

SMALL = ("family.z_dim=8", "family.ngf=4", "family.ndf=4")
LEARNS = ("family.z_dim=8", "family.ngf=16", "family.ndf=16", "optim.betas=[0.5, 0.999]")
LEARNS += ("stages.0.lr=2.0e-3",)


def test_d_and_g_take_turns():
    family = make_family("dcgan", 16, *SMALL)
    assert [(p.name, p.network, p.every) for p in family.phases] == [("D", "D", 1), ("G", "G", 1)]


def test_losses_are_torch_s_cross_entropy_of_what_d_says():
    family, batch = make_family("dcgan", 16, *SMALL), make_batch(drawn_images(8, 16))
    seen = []
    family.D.register_forward_hook(lambda _module, args, out: seen.append((args[0], out)))
    d, g = (phase.losses(batch)[0]["bce"] for phase in family.phases)
    (real_in, real), (fake_in, fake), (_, again) = seen
    assert torch.equal(real_in, batch["image"]) and not torch.equal(real_in, fake_in)
    reference = F.binary_cross_entropy_with_logits
    expected = reference(real, torch.ones(8)) + reference(fake, torch.zeros(8))
    torch.testing.assert_close(d, expected)
    torch.testing.assert_close(g, reference(again, torch.ones(8)))


def test_d_and_g_see_other_noise():
    family, batch = make_family("dcgan", 16, *SMALL), make_batch(drawn_images(8, 16))
    latents = []
    family.G.register_forward_hook(lambda _module, args, _out: latents.append(args[0]))
    for phase in family.phases:
        phase.losses(batch)
    assert not torch.allclose(*latents, atol=1e-2)


@pytest.mark.parametrize("resolution", [8, 256])
def test_a_resolution_out_of_range_is_a_clear_error(resolution):
    with pytest.raises(ConfigError, match=f"stages: dcgan makes .* not {resolution}"):
        make_family("dcgan", resolution)


def test_a_width_out_of_range_is_a_clear_error():
    with pytest.raises(ConfigError, match=r"ngf: .* not 0"):
        make_family("dcgan", 16, "family.ngf=0")


def test_it_learns_eight_images():
    images = drawn_images(8, 16)
    family = make_family("dcgan", 16, *LEARNS)
    training = Training(family)
    before = energy_distance(training.samples(64), images)
    training.run(images, 250)
    assert energy_distance(training.samples(64), images) < before / 2.5
