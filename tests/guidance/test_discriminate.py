"""The discriminator as a family uses it: its losses by hand, in any cut, and it learns."""

import json
import math

import pytest
import torch
from pydantic import ValidationError
from torch.nn import functional as F

from dinogen.config import ConfigError, GuideConfig, StageConfig
from dinogen.guidance.discriminator import Adversary
from dinogen.guidance.options import DiscriminatorOptions
from tests.guidance.discriminators import KINDS, PENALTIES, SIDE, logits_by_hand, random_images

CPU = torch.device("cpu")
every_kind = pytest.mark.parametrize("kind", KINDS)


def total(found):
    losses, report = found
    assert all(value.shape == () for value in (losses | report).values())
    return torch.stack(list(losses.values())).sum()


def by_part(adversary, which, real, fake, positions):
    """One of the three losses, of part of a batch."""
    if which == "G":
        return adversary.g_losses(fake, real, positions, 700)
    losses = adversary.d_losses if which == "D" else adversary.penalty_losses
    return losses(real, fake, positions)


@every_kind
@pytest.mark.parametrize(
    ("which", "loss"),
    [("D", "hinge"), ("D", "relativistic"), ("penalty", "hinge"), ("G", "relativistic")],
)
def test_any_cut_gives_the_same_losses_and_gradients(kind, which, loss, make):
    adversary = make(kind, loss=loss, **PENALTIES)
    real, positions = random_images(), torch.arange(50, 56)
    found = []
    for cuts in ([slice(0, 6)], [slice(0, 2), slice(2, 6)]):
        fake = random_images(seed=1).requires_grad_()
        adversary.network.zero_grad()
        values = {}
        for cut in cuts:
            share = (cut.stop - cut.start) / 6
            losses, report = by_part(adversary, which, real[cut], fake[cut], positions[cut])
            (sum(losses.values()) * share).backward()
            for name, value in (losses | report).items():
                values[name] = values.get(name, 0) + share * value.detach()
        gradients = [p.grad.clone() for p in adversary.network.parameters()]
        found.append((values, gradients, [] if fake.grad is None else [fake.grad]))
    assert (found[0][2] != []) == (which == "G"), "only G's loss reaches the images"
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-5)


@every_kind
@pytest.mark.parametrize("which", ["D", "penalty"])
def test_every_parameter_of_d_gets_a_gradient_and_the_guide_none(kind, which, make, guide):
    adversary = make(kind, **PENALTIES)
    last = [p for p in adversary.network.parameters() if p.shape == (1,)]
    assert len(last) == 2
    for bias in last:
        # within the hinge's margin real and fake images pull at it alike: what is left is rounding
        torch.nn.init.constant_(bias, 1.5)
    total(
        by_part(adversary, which, random_images(), random_images(seed=1), torch.arange(6))
    ).backward()
    assert [name for name, p in adversary.network.named_parameters() if p.grad is None] == []
    nothing = {n for n, p in adversary.network.named_parameters() if not p.grad.abs().sum()}
    # the last bias, and that of the norm before the last LeakyReLU, have no part in D's slope
    assert len(nothing) == (4 if which == "penalty" else 0)
    assert all(name.endswith("bias") for name in nothing)
    assert all(p.grad is None and not p.requires_grad for p in guide.parameters())


@pytest.mark.parametrize("loss", ["hinge", "relativistic"])
def test_losses_are_those_of_the_heads_on_each_layer(loss, make, guide):
    adversary = make(loss=loss, augment=(), weight=0.5, ramp_kimg=1)
    real, fake, positions = random_images(), random_images(seed=1), torch.arange(6)
    with torch.no_grad():
        reals, fakes = (logits_by_hand(adversary, guide, x) for x in (real, fake))
    d, g = [], []
    for r, f in zip(reals, fakes, strict=True):
        if loss == "hinge":
            d.append((1 - r).clamp(min=0).mean() + (1 + f).clamp(min=0).mean())
            g.append(-f.mean())
        else:
            d.append(-F.logsigmoid(r - f).mean())
            g.append(-F.logsigmoid(f - r).mean())
    losses, report = adversary.d_losses(real, fake, positions)
    assert list(losses) == [loss]
    torch.testing.assert_close(losses[loss], (d[0] + d[1]) / 2)
    torch.testing.assert_close(report["real"], (reals[0].mean() + reals[1].mean()) / 2)
    torch.testing.assert_close(report["fake"], (fakes[0].mean() + fakes[1].mean()) / 2)
    losses, report = adversary.g_losses(fake, real, positions, 400)
    torch.testing.assert_close(losses["adversarial"], 0.5 * 0.4 * (g[0] + g[1]) / 2)
    assert report["adversarial_weight"].item() == pytest.approx(0.2)


@every_kind
def test_a_pair_is_augmented_and_cropped_alike(kind, make):
    adversary = make(kind, loss="relativistic")
    losses, _ = adversary.d_losses(random_images(), random_images(), torch.arange(6))
    assert losses["relativistic"].item() == pytest.approx(math.log(2), abs=1e-6)
    one, other = (
        adversary.d_losses(random_images(), random_images(seed=1), torch.arange(first, first + 6))[
            0
        ]
        for first in (0, 6)
    )
    assert one["relativistic"].item() != pytest.approx(other["relativistic"].item(), abs=1e-7)


def test_the_weight_rises_linearly_and_stays(make):
    adversary = make(weight=0.3, ramp_kimg=2)
    found = [adversary.weight(nimg) for nimg in (0, 500, 1000, 2000, 9000)]
    assert found == pytest.approx([0, 0.075, 0.15, 0.3, 0.3])
    assert make(weight=0.3, ramp_kimg=0).weight(0) == 0.3


@every_kind
def test_under_autocast_losses_are_near_and_penalties_the_same(kind, make):
    adversary = make(kind, **PENALTIES)
    parts = {
        w: (random_images(), random_images(seed=1), torch.arange(6)) for w in ("D", "G", "penalty")
    }
    plain = {which: total(by_part(adversary, which, *args)) for which, args in parts.items()}
    with torch.autocast("cpu", torch.bfloat16):
        mixed = {which: total(by_part(adversary, which, *args)) for which, args in parts.items()}
    assert {value.dtype for value in mixed.values()} == {torch.float32}
    torch.testing.assert_close(mixed["penalty"], plain["penalty"])
    for which in ("D", "G"):
        torch.testing.assert_close(mixed[which], plain[which], rtol=0.05, atol=0.05)


def test_spectral_norms_iterate_after_the_step_alone(make):
    adversary = make(**PENALTIES)
    with torch.no_grad():
        for parameter in adversary.network.parameters():
            parameter.add_(torch.randn_like(parameter))

    def vectors():
        return torch.cat([b.flatten() for b in adversary.network.buffers()])

    start = vectors()
    for which in ("D", "penalty", "G"):
        by_part(adversary, which, random_images(), random_images(seed=1), torch.arange(6))
    assert torch.equal(vectors(), start)
    adversary.after_step()
    assert not torch.equal(vectors(), start)


def test_realism_is_the_mean_logit_of_the_image_as_it_is(make, guide):
    adversary, images = make(), random_images()
    found = adversary.realism(images)
    assert found.shape == (6,) and found.dtype == torch.float32
    expected = sum(one.mean((1, 2)) for one in logits_by_hand(adversary, guide, images)) / 2
    torch.testing.assert_close(found, expected.detach(), rtol=1e-3, atol=1e-5)
    assert torch.equal(adversary.realism(images[2:3])[0], found[2])


def test_realism_of_crops_is_the_mean_over_the_image(make):
    adversary, image = make("crop"), random_images(1)
    corners = [image[:, :, y : y + 28, x : x + 28] for y in (0, 4) for x in (0, 4)]
    whole = DiscriminatorOptions(head_channels=8, grid=2)
    other = Adversary(whole, adversary._guide_config, StageConfig(resolution=16, kimg=1), 0, CPU)
    other.network = adversary.network
    expected = torch.stack([other.realism(corner)[0] for corner in corners]).mean()
    torch.testing.assert_close(adversary.realism(image)[0], expected)


@every_kind
def test_it_is_rebuilt_from_its_arguments_and_built_without_memory(kind, make, main):
    adversary = make(kind)
    arguments = adversary.arguments()
    assert json.loads(json.dumps(arguments)) == arguments
    type(adversary.network)(**arguments).load_state_dict(adversary.network.state_dict())
    with torch.device("meta"):
        nowhere = Adversary(
            adversary.options, main, StageConfig(resolution=64, kimg=1), 0, torch.device("meta")
        )
    shapes = [{k: v.shape for k, v in d.network.state_dict().items()} for d in (nowhere, adversary)]
    assert shapes[0] == shapes[1], "and goes on from one stage to the next"


def test_the_guide_is_the_run_s_own_or_the_options(make, main, guide):
    assert make()._guide is guide
    own = GuideConfig(path=main.path, layer=1)
    adversary = make(guide=own)
    assert adversary._guide is not guide
    assert adversary.arguments()["num_channels"] == [24]
    assert adversary.realism(random_images(2)).shape == (2,)
    # where nothing is trained, begin() is not called
    alone = Adversary(adversary.options, main, StageConfig(resolution=32, kimg=1), 0, CPU)
    alone.network.load_state_dict(adversary.network.state_dict())
    torch.testing.assert_close(alone.realism(random_images(2)), adversary.realism(random_images(2)))


def test_it_applies_from_its_resolution_on():
    options = DiscriminatorOptions(from_resolution=64)
    sizes = [
        size for size in (32, 64, 128) if options.applies(StageConfig(resolution=size, kimg=1))
    ]
    assert sizes == [64, 128]


def test_what_does_not_fit_is_refused(make):
    with pytest.raises(ConfigError, match=r"discriminator\.crop: dinov2 .* 30 pixels: use 28"):
        make("whole", crop=30)
    make("whole", side=16, crop=30)  # a smaller image is not cropped
    with pytest.raises(ConfigError, match=r"discriminator\.patch_scales: 8x8 pixels .* 2 scales"):
        make("patch", side=8)
    with pytest.raises(ValidationError, match="leave out guide"):
        DiscriminatorOptions(kind="patch", guide=GuideConfig())
    with pytest.raises(ValidationError, match="set penalty_on: pixels"):
        DiscriminatorOptions(kind="patch", penalty_on="features")


def striped(num, upright, first=0):
    """Stripes of drawn phase and colours, upright or level."""
    generator = torch.Generator().manual_seed(first + 1000 * upright)
    axis = torch.linspace(0, 6 * math.pi, SIDE)
    phase = 6.3 * torch.rand(num, 1, generator=generator)
    wave = torch.sin(axis + phase)[:, None, None, :].expand(num, 3, SIDE, SIDE)
    wave = wave if upright else wave.transpose(2, 3)
    low, high = torch.rand(2, num, 3, 1, 1, generator=generator) * 2 - 1
    return low + (high - low) * (wave + 1) / 2


@pytest.mark.parametrize(
    ("kind", "loss"), [("whole", "hinge"), ("crop", "relativistic"), ("patch", "hinge")]
)
def test_it_learns_to_tell_two_kinds_of_images_apart(kind, loss, make):
    adversary = make(kind, loss=loss, weight=1.0)
    optimizer = torch.optim.Adam(adversary.network.parameters(), 1e-2, betas=(0.5, 0.99))
    for step in range(60):
        positions = torch.arange(16 * step, 16 * step + 16)
        real, fake = (striped(16, upright, 16 * step) for upright in (True, False))
        total(adversary.d_losses(real, fake, positions)).backward()
        optimizer.step()
        optimizer.zero_grad()
        adversary.after_step()
    # images that it has not seen
    real, fake = (adversary.realism(striped(32, upright, 999)) for upright in (True, False))
    right = (real[:, None] > fake).float().mean()
    assert right > 0.9
    # and its gradient improves generated images
    fakes = striped(8, False, 777).requires_grad_()
    total(adversary.g_losses(fakes, striped(8, True, 777), torch.arange(8), 10**6)).backward()
    better = (fakes - 20 * fakes.grad).detach()
    assert adversary.realism(better).mean() > adversary.realism(fakes.detach()).mean()
