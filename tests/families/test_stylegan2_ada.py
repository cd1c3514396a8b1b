"""Family stylegan2_ada: its phases by hand, what it remembers, cuts of a batch, that it learns."""

import pytest
import torch

from dinogen.distributed import rng
from dinogen.losses.adversarial import path_lengths
from tests.families.gans import (
    Training,
    assert_any_cut_gives_the_same_gradient,
    drawn_images,
    energy_distance,
    make_batch,
    make_family,
)

SMALL = [
    "family.z_dim=8",
    "family.w_dim=8",
    "family.channel_base=128",
    "family.channel_max=8",
]


def make(*overrides, resolution=16):
    family = make_family("stylegan2_ada", resolution, *SMALL, *overrides)
    with torch.no_grad():
        for name, parameter in family.G.named_parameters():
            if name.endswith("noise_strength"):
                parameter.fill_(0.1)
    return family


def phase(family, name):
    (found,) = [phase for phase in family.phases if phase.name == name]
    return found


def conditional(batch):
    return batch | {"label": batch["position"] % 3}


def only(family, name):
    for key, network in family.networks.items():
        network.requires_grad_(key == name)


def test_phases_scales_and_gamma_of_the_paper():
    family = make("stages.0.batch=16")
    assert [(p.name, p.network, p.every) for p in family.phases] == [
        ("D", "D", 1),
        ("D_reg", "D", 16),
        ("G", "G", 1),
        ("G_reg", "G", 4),
    ]
    assert family.optimizer_scale("D") == 16 / 17
    assert family.optimizer_scale("G") == 4 / 5
    assert family.r1_gamma == pytest.approx(0.0002 * 16**2 / 16)
    without = make("family.path_weight=0", "family.r1_gamma=3")
    assert [p.name for p in without.phases] == ["D", "D_reg", "G"]
    assert without.optimizer_scale("G") == 1
    assert without.r1_gamma == 3


@pytest.mark.parametrize("p", [0.0, 0.6])
def test_any_cut_of_a_batch_gives_the_same_gradient(p):
    family = make()
    family.D.ada.p.fill_(p)
    assert_any_cut_gives_the_same_gradient(family, drawn_images(12, 16), cut=4)


def test_what_is_remembered_does_not_depend_on_the_cut():
    family = make()
    family.D.ada.p.fill_(0.5)
    batch = make_batch(drawn_images(12, 16))
    for own in family.phases:
        only(family, own.network)
        whole = own.losses(batch)[1]
        parts = [
            own.losses({k: v[s] for k, v in batch.items()})[1] for s in (slice(4), slice(4, 12))
        ]
        for name in own.remembered:
            mean = parts[0][name] / 3 + parts[1][name] * 2 / 3
            torch.testing.assert_close(mean, whole[name], rtol=1e-3, atol=1e-5)


def test_path_length_is_taken_on_even_positions():
    family = make()
    family.G.path_mean.fill_(0.7)
    only(family, "G")
    batch = make_batch(drawn_images(8, 16), step=1)
    losses, report = phase(family, "G_reg").losses(batch)
    positions = batch["position"][::2]
    _, ws = family._styles("G_reg", positions, None)
    y = rng.normal(0, "y", positions, (3, 16, 16))
    lengths = path_lengths(family._images("G_reg", positions, ws), ws, y)
    torch.testing.assert_close(report["length"], lengths.mean())
    torch.testing.assert_close(losses["path"], 4 * 2 * (lengths - 0.7).square().mean())


def test_a_part_without_even_positions_counts_nothing():
    family = make()
    only(family, "G")
    batch = {k: v[1:2] for k, v in make_batch(drawn_images(8, 16)).items()}
    losses, report = phase(family, "G_reg").losses(batch)
    assert losses["path"] == 0
    assert report["length"] == 0
    losses["path"].backward()
    assert all(p.grad is not None and not p.grad.any() for p in family.G.parameters())


def test_r1_is_autograds_through_the_augmentation():
    family = make("family.r1_gamma=3")
    family.D.ada.p.fill_(0.5)
    only(family, "D")
    batch = make_batch(drawn_images(8, 16))
    losses, _ = phase(family, "D_reg").losses(batch)
    images = batch["image"].clone().requires_grad_()
    logits = family._logits("D_reg", images, batch["position"], None)
    (gradient,) = torch.autograd.grad(logits.sum(), images)
    expected = 16 * 3 / 2 * gradient.square().flatten(1).sum(1).mean()
    torch.testing.assert_close(losses["r1"], expected)


@pytest.mark.parametrize("name", ["D_reg", "G_reg"])
def test_regularisers_are_float32_under_autocast(name):
    family = make()
    own = phase(family, name)
    only(family, own.network)
    batch = make_batch(drawn_images(8, 16))
    expected, _ = own.losses(batch)
    with torch.autocast("cpu", torch.float16):
        losses, _ = own.losses(batch)
    assert losses == expected


def test_remembering_moves_its_buffers():
    family = make("stages.0.batch=16", "family.ada_kimg=1")
    for _ in range(4):
        family.remember("D", {"sign": torch.tensor(0.9)})
    assert family.D.ada.p == pytest.approx(4 * 16 / 1000)
    for _ in range(8):
        family.remember("D", {"sign": torch.tensor(0.5)})
    assert family.D.ada.p == 0
    family.remember("G", {"w": torch.full((8,), 2.0)})
    torch.testing.assert_close(family.G.w_avg, torch.full((8,), 0.004))
    family.remember("G_reg", {"length": torch.tensor(5.0)})
    family.remember("G_reg", {"length": torch.tensor(5.0)})
    assert family.G.path_mean == pytest.approx(5 * (1 - 0.99**2))


def test_the_sign_is_that_of_reals_and_w_is_its_mean():
    family = make()
    batch = make_batch(drawn_images(8, 16))
    _, report = phase(family, "D").losses(batch)
    logits = family._logits("D/real", batch["image"], batch["position"], None)
    assert report["sign"] == logits.sign().mean()
    z = rng.normal(0, "z/G", batch["position"], (8,))
    _, report = phase(family, "G").losses(batch)
    torch.testing.assert_close(report["w"], family.G.mapping(z).mean(0))


def test_styles_mix_two_latents_at_a_place_of_their_own():
    positions = torch.arange(200)
    family = make("family.style_mixing=0.9")
    w, ws = family._styles("G", positions, None)
    own = (ws == w[:, None]).all(2)
    num_own = own.sum(1)
    # the first that many are w, and all others one other w
    assert torch.equal(own, torch.arange(6) < num_own[:, None])
    mixed = num_own < 6
    assert abs(mixed.float().mean() - 0.9) < 0.07
    assert set(num_own[mixed].tolist()) == {1, 2, 3, 4, 5}
    last = ws[:, -1]
    assert all(
        (row[n:] == last[i]).all() for i, (row, n) in enumerate(zip(ws, num_own, strict=True))
    )
    plain = make("family.style_mixing=0")
    w, ws = plain._styles("G", positions, None)
    assert torch.equal(ws, w[:, None].expand(-1, 6, -1))


def test_d_and_g_see_other_latents_noise_and_augmentations():
    family = make()
    family.D.ada.p.fill_(1.0)
    positions = torch.arange(4)
    (_, ws), (_, other) = family._styles("D", positions, None), family._styles("G", positions, None)
    assert not torch.allclose(ws, other)
    assert not torch.allclose(
        family._images("D", positions, ws), family._images("G", positions, ws)
    )
    images = drawn_images(4, 16)
    assert not torch.allclose(
        family._logits("D/real", images, positions, None),
        family._logits("G", images, positions, None),
    )


def test_full_truncation_leaves_one_image():
    family = make("family.truncation=0")
    samples = family.sample(family.networks, torch.arange(4), 0)
    torch.testing.assert_close(samples, samples[:1].expand(4, -1, -1, -1))


def test_with_classes_labels_matter_and_samples_take_turns():
    family = make("family.num_classes=3")
    assert family.inputs.labels
    batch = conditional(make_batch(drawn_images(8, 16)))
    for own in family.phases:
        only(family, own.network)
        losses, _ = own.losses(batch)
        other, _ = own.losses(batch | {"label": (batch["label"] + 1) % 3})
        assert losses.keys() == other.keys()
        assert all(losses[name] != other[name] for name in losses)
        sum(losses.values()).backward()
        network = family.networks[own.network]
        assert [name for name, p in network.named_parameters() if p.grad is None] == []
    z = rng.normal(0, "sample", torch.arange(6), (8,))
    expected = family.G(z, torch.arange(6) % 3).clamp(-1, 1)
    torch.testing.assert_close(family.sample(family.networks, torch.arange(6), 0), expected)


def test_without_classes_no_labels_are_read():
    assert not make().inputs.labels


def test_it_learns_eight_images():
    overrides = ["optim.betas=[0.0, 0.99]", "stages.0.lr=0.005", "stages.0.batch=8"]
    overrides += ["family.channel_max=32", "family.channel_base=256", "family.ada_kimg=20"]
    overrides += ["family.r1_gamma=0.1", "family.path_weight=0"]
    overrides += ["ema.halflife_kimg=0.2", "ema.rampup=0.2"]
    images = drawn_images(8, 8)
    training = Training(make(*overrides, resolution=8))
    before = energy_distance(training.samples(64), images)
    training.run(images, 150)
    assert energy_distance(training.samples(64), images) < 0.25 * before
