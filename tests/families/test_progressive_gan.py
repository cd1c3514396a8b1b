"""The progressive GAN as a family: growth of both networks, lazy R1, and that it learns."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from dinogen.config import ConfigError
from dinogen.training.checkpointing.checkpoint import newest_checkpoint
from dinogen.training.checkpointing.transfer import grow
from dinogen.training.run import train
from tests.families.gans import (
    Training,
    assert_any_cut_gives_the_same_gradient,
    assert_each_phase_changes_its_network_alone,
    drawn_images,
    energy_distance,
    make_batch,
    make_family,
)
from tests.families.tiny import tiny_config

SMALL = ("family.z_dim=8", "family.channel_base=64", "family.channel_max=8")


@pytest.mark.parametrize(("resolution", "fading"), [(4, False), (16, False), (16, True)])
def test_each_phase_changes_its_network_alone(resolution, fading):
    family = make_family("progressive_gan", resolution, *SMALL)
    family.set_fade(family.networks, 0.5 if fading else 1.0, fading)
    assert_each_phase_changes_its_network_alone(family, drawn_images(8, resolution))


def test_all_in_use_trains_and_only_that():
    family = make_family("progressive_gan", 16, *SMALL)
    old = {"G": family.G.old_to_rgb(), "D": family.D.old_from_rgb()}
    for name, network in family.networks.items():
        names = {n for n, _ in network.named_parameters()}
        assert old[name] and family.trainable(name) == names - old[name]
        family.set_fade({name: network}, 0.2, True)
        assert family.trainable(name) == names
        assert family.new_parameters(name) == network.new_parameters()


def test_the_fade_reaches_both_networks_and_the_averages():
    family = make_family("progressive_gan", 8, *SMALL)
    ema = Training(family).ema.networks
    for networks in (family.networks, ema):
        family.set_fade(networks, 0.25, True)
    for network in (family.G, family.D, ema["G"]):
        assert network.alpha.item() == 0.25 and network.fading


def test_grown_at_alpha_0_nothing_has_changed_yet():
    before, grown = (make_family("progressive_gan", r, *SMALL, seed=r) for r in (8, 16))
    for name, network in grown.networks.items():
        state = before.networks[name].state_dict()
        grow(network, state, grown.new_parameters(name), ConfigError)
    grown.set_fade(grown.networks, 0.0, True)
    small = drawn_images(8, 8)
    large = F.interpolate(small, scale_factor=2, mode="nearest")
    for phase, grown_phase in zip(before.phases, grown.phases, strict=True):
        if phase.name == "D_reg":
            continue  # a gradient with respect to pixels, which are other ones
        losses, _ = phase.losses(make_batch(small))
        grown_losses, _ = grown_phase.losses(make_batch(large))
        torch.testing.assert_close(grown_losses, losses)


@pytest.mark.parametrize("num", [8, 6])
def test_on_a_gpu_d_s_losses_are_those_of_real_and_generated_images_apart(num, monkeypatch):
    family = make_family("progressive_gan", 16, *SMALL)
    seen = []
    family.D.register_forward_hook(lambda _module, args, _out: seen.append(args[0].detach()))
    batch = make_batch(drawn_images(num, 16))
    apart = family.phases[0].losses(batch)
    real, fake = seen
    monkeypatch.setattr(family, "device", SimpleNamespace(type="cuda"))
    monkeypatch.setattr(family, "_generate", lambda *_: fake)
    together = family.phases[0].losses(batch)
    assert torch.equal(seen[2], torch.cat([real, fake]))
    torch.testing.assert_close(together, apart)


def test_real_images_are_faded_as_generated_ones_are():
    family = make_family("progressive_gan", 16, *SMALL)
    seen = []
    family.D.register_forward_hook(lambda _module, args, _out: seen.append(args[0]))
    batch = make_batch(drawn_images(8, 16))
    family.phases[0].losses(batch)
    assert torch.equal(seen[0], batch["image"])
    family.set_fade(family.networks, 0.25, True)
    seen.clear()
    family.phases[0].losses(batch)
    blocks = batch["image"].reshape(8, 3, 8, 2, 8, 2)
    coarse = blocks.mean((3, 5), keepdim=True).expand_as(blocks).reshape(8, 3, 16, 16)
    torch.testing.assert_close(seen[0], 0.25 * batch["image"] + 0.75 * coarse)


@pytest.mark.parametrize(("every", "scale"), [(1, 0.5), (4, 0.8), (16, 16 / 17)])
def test_r1_is_lazy_and_weighs_as_if_it_were_not(every, scale):
    family = make_family("progressive_gan", 8, *SMALL, f"family.r1_every={every}")
    (phase,) = (p for p in family.phases if p.name == "D_reg")
    assert phase.every == every and phase.network == "D"
    assert family.optimizer_scale("D") == pytest.approx(scale)
    assert family.optimizer_scale("G") == 1
    losses, report = phase.losses(make_batch(drawn_images(8, 8)))
    images = drawn_images(8, 8).requires_grad_()
    (gradient,) = torch.autograd.grad(family.D(images).sum(), images)
    expected = gradient.square().sum((1, 2, 3)).mean()
    torch.testing.assert_close(report["penalty"], expected)
    gamma = 10 * (8 / 256) ** 2
    torch.testing.assert_close(losses["r1"], every * gamma / 2 * expected)


def test_a_cut_at_a_group_s_border_gives_the_same_gradient():
    family = make_family("progressive_gan", 16, *SMALL)
    assert_any_cut_gives_the_same_gradient(family, drawn_images(12, 16), cut=4)


def test_both_networks_grow_in_a_real_run(disc_data, tmp_path):
    stages = "[{resolution: 8, kimg: 0.016, batch: 8}, "
    stages += "{resolution: 16, kimg: 0.032, fade_kimg: 0.016, batch: 8}]"
    config = tiny_config("progressive_gan", disc_data, tmp_path, f"stages={stages}")
    train(config)
    for name, rgb in (("G", "to_rgb"), ("D", "from_rgb")):
        before, grown = (
            newest_checkpoint(tmp_path / size / "checkpoints").tensors(name)
            for size in ("8x8", "16x16")
        )
        assert grown["alpha"].item() == 1
        assert {f"{rgb}.8.weight", f"{rgb}.16.weight", "blocks.16.conv0.weight"} <= set(grown)
        # while the new block faded in, all of the old one learnt on
        moved = [key for key in set(before) & set(grown) if not before[key].equal(grown[key])]
        assert f"{rgb}.8.weight" in moved
        assert any(key.startswith("blocks.8.") for key in moved)


def test_it_learns_eight_images_grown_from_8_to_16():
    images = drawn_images(8, 16)
    options = ("family.z_dim=8", "family.channel_base=256", "family.channel_max=16")
    options += ("optim.betas=[0.0, 0.99]", "stages.0.lr=2.0e-3", "stages.0.batch=8")
    first = Training(make_family("progressive_gan", 8, *options))
    first.run(F.avg_pool2d(images, 2), 100)

    family = make_family("progressive_gan", 16, *options)
    before = energy_distance(Training(family).samples(64), images)
    for name, network in family.networks.items():
        state = first.family.networks[name].state_dict()
        grow(network, state, family.new_parameters(name), ConfigError)
    second = Training(family)
    for step in range(100):
        alpha = min(1.0, step / 50)
        for networks in (family.networks, second.ema.networks):
            family.set_fade(networks, alpha, alpha < 1)
        if alpha in (0.0, 1.0):
            second.engine.prepare()
        second.run(images, 1)
    assert energy_distance(second.samples(64), images) < before / 2.5
