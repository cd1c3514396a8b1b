"""SAGAN as a family: what it changes in WGAN-GP, and that it learns eight images."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from dinogen.config import ConfigError
from dinogen.distributed import rng
from dinogen.networks.layers import SelfAttention, SpectralNorm
from tests.families.gans import (
    Training,
    assert_any_cut_gives_the_same_gradient,
    drawn_images,
    energy_distance,
    make_batch,
    make_family,
)

SMALL = ("family.z_dim=8", "family.channels=4", "family.channel_max=8", "family.attention=[8]")
LEARNS = ("family.z_dim=8", "family.channels=8", "family.channel_max=16", "family.attention=[8]")
LEARNS += ("optim.betas=[0.0, 0.9]", "stages.0.lr=2.0e-3", "stages.0.batch=8")


def test_group_and_spectral_norm_stand_for_batch_and_instance_norm():
    family = make_family("sagan", 16, *SMALL)
    modules = [*family.G.modules(), *family.D.modules()]
    assert not any(isinstance(m, (nn.BatchNorm2d, nn.InstanceNorm2d)) for m in modules)
    assert any(isinstance(m, nn.GroupNorm) for m in family.G.modules())
    assert any(parametrize.is_parametrized(m) for m in family.D.modules())
    for network in family.networks.values():
        assert sum(isinstance(m, SelfAttention) for m in network.modules()) == 1


def test_any_cut_into_microbatches_gives_the_same_gradient():
    family = make_family("sagan", 16, *SMALL)
    assert_any_cut_gives_the_same_gradient(family, drawn_images(8, 16), cut=3)


def test_spectral_norms_iterate_once_per_step_however_many_forwards():
    family, batch = make_family("sagan", 16, *SMALL), make_batch(drawn_images(8, 16))

    def vectors():
        named = family.D.named_buffers()
        return torch.cat([b.flatten() for name, b in named if name.endswith((".u", ".v"))])

    with torch.no_grad():
        for parameter in family.D.parameters():
            parameter.add_(torch.randn_like(parameter))
    start = vectors()
    for phase in family.phases:
        phase.losses(batch)
    assert torch.equal(vectors(), start)
    family.after_step(8)
    assert not torch.equal(vectors(), start)


def test_the_critic_s_weights_are_divided_once_for_scores_and_penalty():
    family, calls = make_family("sagan", 16, *SMALL), []
    norms = [m for m in family.D.modules() if isinstance(m, SpectralNorm)]
    for norm in norms:
        norm.register_forward_hook(lambda norm, *_: calls.append(norm))
    for times in (1, 2):
        family.phases[0].losses(make_batch(drawn_images(8, 16)))
        assert len(calls) == times * len(norms) and set(calls) == set(norms)


def test_attention_at_a_size_that_is_not_there_is_a_clear_error():
    with pytest.raises(ConfigError, match=r"family\.attention: 32 is the size of no map"):
        make_family("sagan", 16, "family.attention=[8, 32]")


def test_the_hinge_loss_is_that_of_the_paper():
    family = make_family("sagan", 16, *SMALL, "family.loss=hinge", "family.n_critic=1")
    assert all(phase.every == 1 and not phase.second_order for phase in family.phases)
    for network in family.networks.values():
        for module in network.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)) and "attention" not in str(type(module)):
                assert parametrize.is_parametrized(module), module
    batch = make_batch(drawn_images(4, 16))
    d_phase, g_phase = family.phases
    losses, seen = d_phase.losses(batch)
    generated = family.G(rng.normal(family.config.seed, "z/D", batch["position"], (8,)))
    real, fake = family.D(torch.cat([batch["image"], generated])).chunk(2)
    by_hand = (1 - real).clamp(min=0).mean() + (1 + fake).clamp(min=0).mean()
    torch.testing.assert_close(losses["hinge"], by_hand)
    torch.testing.assert_close(seen["real"], real.mean())
    losses, _ = g_phase.losses(batch)
    generated = family.G(rng.normal(family.config.seed, "z/G", batch["position"], (8,)))
    torch.testing.assert_close(losses["hinge"], -family.D(generated).mean())


def test_the_hinge_loss_has_no_weight_of_a_gradient_penalty():
    with pytest.raises(ConfigError, match="gp_weight: loss hinge has no gradient penalty"):
        make_family("sagan", 16, "family.loss=hinge", "family.gp_weight=1")


@pytest.mark.parametrize("loss", ["hinge", "wasserstein"])
def test_a_step_iterates_every_spectral_norm(loss):
    family = make_family("sagan", 16, *SMALL, f"family.loss={loss}")
    normalised = {
        name
        for name, network in family.networks.items()
        if any(parametrize.is_parametrized(module) for module in network.modules())
    }
    assert normalised == ({"G", "D"} if loss == "hinge" else {"D"})
    before = copy.deepcopy({name: net.state_dict() for name, net in family.networks.items()})
    with torch.no_grad():
        for network in family.networks.values():
            for parameter in network.parameters():
                parameter.add_(torch.randn_like(parameter))
    family.after_step(8)
    for name in normalised:
        state = family.networks[name].state_dict()
        vectors = [key for key, value in state.items() if key.endswith(".u") and len(value) > 1]
        assert vectors and not any(state[key].equal(before[name][key]) for key in vectors)


@pytest.mark.parametrize("loss", ["hinge", "wasserstein"])
def test_it_learns_eight_images(loss):
    images = drawn_images(8, 16)
    family = make_family("sagan", 16, *LEARNS, f"family.loss={loss}")
    training = Training(family)
    before = energy_distance(training.samples(64), images)
    training.run(images, 150)
    assert energy_distance(training.samples(64), images) < before / 2
