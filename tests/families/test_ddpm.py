"""Family ddpm: its loss by hand, its samples, classes and guidance, and that it learns."""

import math

import pytest
import torch

from dinogen.config import Config, ConfigError
from dinogen.diffusion.process import Schedule, sample, target
from dinogen.distributed import rng
from dinogen.families.ddpm import Ddpm
from dinogen.families.registry import family_options

SMALL = {
    "base_channels": 16,
    "channel_multipliers": [1, 2],
    "num_blocks": 1,
    "attention_resolutions": [8],
    "head_channels": 16,
}


def config_of(**options):
    return Config.model_validate(
        {"family": {"name": "ddpm"} | options, "stages": [{"resolution": 16, "kimg": 1}]}
    )


def make(**options):
    config = config_of(**SMALL | options)
    torch.manual_seed(0)
    return Ddpm(config, config.stages[0], torch.device("cpu"))


def random_images(num=8, size=16):
    """Discs of different places, sizes and colours on grounds of different colours."""
    generator = torch.Generator().manual_seed(0)
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    images = []
    for _ in range(num):
        cy, cx, r = (torch.rand(3, generator=generator) * 8 + 4).tolist()
        inside = (y - cy) ** 2 + (x - cx) ** 2 < (r / 2 + 1) ** 2
        colours = torch.rand(2, 3, 1, 1, generator=generator) * 1.8 - 0.9
        images.append(torch.where(inside, colours[0], colours[1]))
    return torch.stack(images)


def batch_of(images, first=0):
    num = len(images)
    return {
        "image": images,
        "position": torch.arange(first, first + num),
        "label": torch.arange(num) % 2,
    }


class Constant(torch.nn.Module):
    """Says a number that tells the label apart, and notes the labels it was given."""

    def __init__(self):
        super().__init__()
        self.labels = []

    def forward(self, x, t, label=None, drop=None, embedding=None):
        self.labels.append(label)
        value = 0.1 if label is None else 0.1 * (label + 1)[:, None, None, None]
        return torch.zeros_like(x) + value


@pytest.mark.parametrize("prediction", ["epsilon", "v", "x0"])
def test_the_loss_by_hand(prediction):
    family = make(prediction=prediction, schedule="linear")
    with torch.no_grad():
        for parameter in family.G.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    batch = batch_of(random_images(), first=40)
    losses, report = family.phases[0].losses(batch)
    assert set(losses) == {prediction} and report == {}

    t = rng.integers(0, "t", batch["position"], high=1000)
    eps = rng.normal(0, "eps", batch["position"], (3, 16, 16))
    alpha_bar, errors = 1.0, []
    table = []
    for i in range(1000):
        alpha_bar *= 1 - (1e-4 + (0.02 - 1e-4) * i / 999)
        table.append(alpha_bar)
    for x0, e, step in zip(batch["image"], eps, t.tolist(), strict=True):
        a, s = math.sqrt(table[step]), math.sqrt(1 - table[step])
        target = {"epsilon": e, "v": a * e - s * x0, "x0": x0}[prediction]
        said = family.G((a * x0 + s * e)[None], torch.tensor([step]))[0]
        errors.append((said - target).square().mean())
    torch.testing.assert_close(losses[prediction], torch.stack(errors).mean())


def test_the_loss_does_not_depend_on_how_the_batch_is_cut():
    family = make()
    torch.nn.init.normal_(family.G.conv_out.weight, std=0.1)
    whole = batch_of(random_images())
    parts = [{key: value[i : i + 2] for key, value in whole.items()} for i in range(0, 8, 2)]
    means = [family.phases[0].losses(part)[0]["v"] for part in parts]
    torch.testing.assert_close(torch.stack(means).mean(), family.phases[0].losses(whole)[0]["v"])


def test_dropout_goes_by_position_and_leaves_out_its_share():
    family = make(dropout=0.25)
    with torch.no_grad():
        for parameter in family.G.parameters():
            parameter.copy_(torch.randn_like(parameter) / 8)
    images = random_images(6)
    (phase,) = family.phases
    whole, _ = phase.losses(batch_of(images))
    parts = [phase.losses(batch_of(images[a : a + 2], first=a))[0]["v"] for a in (0, 2, 4)]
    torch.testing.assert_close(torch.stack(parts).mean(), whole["v"])
    family.options.dropout = 0.0
    assert not torch.allclose(phase.losses(batch_of(images))[0]["v"], whole["v"])

    family.options.dropout = 0.25
    ones = torch.ones(64, 8, 16, 16)
    dropped = family._drop(ones, 3, torch.arange(64))
    assert dropped.unique().tolist() == [0.0, pytest.approx(4 / 3)]
    # of 131,072 draws: four standard deviations
    assert dropped.eq(0).float().mean() == pytest.approx(0.25, abs=0.005)
    assert not dropped.equal(family._drop(ones, 4, torch.arange(64)))


def test_nothing_is_dropped_where_it_is_measured_or_sampled():
    plain, family = make(), make(dropout=0.5)
    family.G.load_state_dict(plain.G.state_dict())
    batch, numbers = batch_of(random_images()), torch.arange(2)
    one, other = (f.held_out({"G": f.G}, batch)["v"] for f in (plain, family))
    assert one.equal(other)
    assert plain.sample({"G": plain.G}, numbers, 0).equal(
        family.sample({"G": family.G}, numbers, 0)
    )


def test_held_out_measures_the_averages_with_draws_of_its_own():
    family, other = make(), make()
    torch.nn.init.normal_(other.G.conv_out.weight, std=0.1)
    batch = batch_of(random_images())
    own = family.held_out({"G": family.G}, batch)
    assert set(own) == {"v"}
    assert own["v"] != family.phases[0].losses(batch)[0]["v"]
    assert own["v"] == family.held_out({"G": family.G}, batch)["v"]
    assert own["v"] != family.held_out({"G": other.G}, batch)["v"]


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_a_sample_does_not_depend_on_the_rest_of_the_batch(sampler):
    family = make(sampler=sampler, sample_steps=5, num_classes=2)
    torch.nn.init.normal_(family.G.conv_out.weight, std=0.1)
    together = family.sample(family.networks, torch.arange(6), seed=3)
    assert together.shape == (6, 3, 16, 16) and together.abs().max() <= 1
    some = family.sample(family.networks, torch.tensor([4, 1]), seed=3)
    torch.testing.assert_close(some, together[[4, 1]], rtol=1e-4, atol=1e-4)
    other = family.sample(family.networks, torch.tensor([4, 1]), seed=4)
    assert (other - some).abs().mean() > 0.1
    assert torch.pdist(together.flatten(1)).min() > 1


def test_ddpm_adds_noise_that_ddim_does_not():
    ddim, ddpm = make(sample_steps=5), make(sample_steps=5, sampler="ddpm")
    a = ddim.sample(ddim.networks, torch.arange(2), seed=0)
    b = ddpm.sample(ddpm.networks, torch.arange(2), seed=0)
    assert (a - b).abs().mean() > 0.1


@pytest.mark.parametrize("guidance", [0.0, 0.5, 1.0, 3.0])
def test_guidance_is_linear_from_no_class_to_the_class_and_beyond(guidance):
    family = make(num_classes=3, guidance=guidance, prediction="x0", sample_steps=1)
    # one step of x0 is what the network says: 0.1 to 0.3 for the classes, 0.4 without
    found = family.sample({"G": Constant()}, torch.arange(6), seed=0).mean((1, 2, 3))
    label = torch.arange(6) % 3
    expected = 0.4 + guidance * (0.1 * (label + 1) - 0.4)
    torch.testing.assert_close(found, expected.clamp(-1, 1))


@pytest.mark.parametrize(("guidance", "forwards"), [(0.0, 1), (1.0, 1), (2.0, 2)])
def test_guidance_costs_a_second_forward_only_where_it_needs_one(guidance, forwards):
    G = Constant()
    make(num_classes=3, guidance=guidance, sample_steps=1).sample({"G": G}, torch.arange(3), 0)
    assert len(G.labels) == forwards


def test_labels_are_left_out_one_time_in_ten_by_draws():
    family = make(num_classes=2)
    family.G = Constant()
    batch = batch_of(torch.zeros(4000, 3, 1, 1))
    for _ in range(2):
        family.phases[0].losses(batch)
    first, again = family.G.labels
    assert torch.equal(first, again)
    dropped = first == 2
    assert torch.equal(first[~dropped], batch["label"][~dropped])
    assert 0.08 < dropped.float().mean() < 0.12


def test_labels_are_read_only_where_there_are_classes():
    assert make(num_classes=2).inputs.labels and not make().inputs.labels
    assert make().inputs.image_size == 16


@pytest.mark.parametrize("unet", [None, {"scale": False, "resampling": "block"}])
def test_the_network_is_rebuilt_from_its_arguments(unet):
    family = make(num_classes=2, unet=unet)
    again = type(family.G)(**family.arguments("G"))
    again.load_state_dict(family.G.state_dict())


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"num_step": 10}, "num_steps"),
        ({"prediction": "noise"}, "prediction"),
        ({"sample_steps": 2000}, "sample_steps 2000"),
        ({"guidance": 2.0}, "num_classes"),
        ({"base_channels": 0}, "base_channels"),
        ({"unet": {"norm_eps": 0}}, "unet.norm_eps"),
        ({"prediction": "epsilon", "latent": {}}, r"set prediction: v, or schedule: linear"),
    ],
)
def test_wrong_options_are_refused_by_name(options, named):
    with pytest.raises(ConfigError, match=named):
        family_options(config_of(**options))


@pytest.mark.parametrize(
    "options",
    [{"prediction": "v"}, {"prediction": "x0"}, {"prediction": "epsilon", "schedule": "linear"}],
)
def test_what_is_allowed_on_latents_bears_a_network_that_errs(options):
    """Of normal latents the best answer is known; with an error of 1 % their spread stays 1."""
    own = family_options(config_of(latent={}, **options))
    schedule = Schedule(own.schedule, own.num_steps)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2000, 4, generator=generator, dtype=torch.float64)

    def predict(x, t):
        level = schedule.signal_noise(t, x)
        best = target(own.prediction, level[0] * x, level[1] * x, *level)
        return best + 0.01 * torch.randn(x.shape, generator=generator, dtype=x.dtype)

    found = sample(predict, schedule, own.prediction, noise, own.sample_steps, clip=False)
    assert float(found.std()) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"attention_resolutions": [32]}, "family.attention_resolutions"),
        ({"head_channels": 10}, "family.head_channels"),
    ],
)
def test_options_that_do_not_fit_each_other_are_refused_by_name(options, named):
    with pytest.raises(ConfigError, match=named):
        make(**options)


@pytest.fixture(scope="module")
def overfitted():
    """(family, held-out loss before, after, images) of some seconds on 8 images."""
    family = make(sample_steps=20)
    images = random_images()
    optimizer = torch.optim.AdamW(family.G.parameters(), betas=(0.9, 0.99))
    measured = batch_of(images.repeat(16, 1, 1, 1))
    with torch.no_grad():
        before = float(family.held_out(family.networks, measured)["v"])
    for i in range(200):
        optimizer.param_groups[0]["lr"] = 4e-3 * min(1.0, (i + 1) / 20, (200 - i) / 100)
        losses, _ = family.phases[0].losses(batch_of(images.repeat(2, 1, 1, 1), first=16 * i))
        optimizer.zero_grad()
        losses["v"].backward()
        optimizer.step()
    with torch.no_grad():
        after = float(family.held_out(family.networks, measured)["v"])
    return family, before, after, images


def test_overfits_8_images(overfitted):
    _, before, after, _ = overfitted
    assert after < before / 3


def test_samples_of_an_overfitted_network_are_near_its_images(overfitted):
    family, _, _, images = overfitted
    found = family.sample(family.networks, torch.arange(16), seed=0)
    distances = torch.cdist(found.flatten(1), images.flatten(1)).square() / (3 * 16 * 16)
    apart = torch.pdist(images.flatten(1)).square().mean() / (3 * 16 * 16)
    assert distances.amin(1).median() < apart / 3
    assert len(set(distances.argmin(1).tolist())) >= 4
