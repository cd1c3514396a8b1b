"""Family flow, and EDM in ddpm: losses by hand, walks with the best network, eight modes."""

import math

import pytest
import torch
from torch import nn

from dinogen.config import Config, ConfigError
from dinogen.distributed import rng
from dinogen.families.registry import family_class, family_options
from tests.families.test_ddpm import SMALL, Constant, batch_of, random_images

MEAN, STD = 0.3, 0.5
KINDS = {
    "flow": ("flow", {}),
    "flow x0": ("flow", {"prediction": "x0"}),
    "flow epsilon": ("flow", {"prediction": "epsilon"}),
    "flow midpoint": ("flow", {"sampler": "midpoint", "times": "uniform"}),
    "edm": ("ddpm", {"prediction": "edm"}),
    "edm euler": ("ddpm", {"prediction": "edm", "sampler": "euler", "sample_steps": 200}),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def config_of(name, **options):
    return Config.model_validate(
        {"family": {"name": name} | options, "stages": [{"resolution": 16, "kimg": 1}]}
    )


def make(name, **options):
    config = config_of(name, **SMALL | options)
    torch.manual_seed(0)
    return family_class(config.family)(config, config.stages[0], torch.device("cpu"))


def of_kind(kind, **more):
    name, options = KINDS[kind]
    return make(name, **options | more)


def moved(family):
    """Its network, away from what is zero at the start."""
    with torch.no_grad():
        for parameter in family.G.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return family.G


@pytest.mark.parametrize("times", ["uniform", "logit_normal"])
@pytest.mark.parametrize("prediction", ["v", "x0", "epsilon"])
def test_the_loss_of_flow_by_hand(prediction, times):
    more = {} if times == "uniform" else {"times_mean": 0.4, "times_std": 0.8}
    family = make("flow", prediction=prediction, times=times, **more)
    G, batch = moved(family), batch_of(random_images(), first=40)
    losses, report = family.phases[0].losses(batch)
    assert set(losses) == {prediction} and report == {}
    if times == "uniform":
        t = rng.uniform(0, "t", batch["position"]).tolist()
    else:
        drawn = rng.normal(0, "t", batch["position"], ()).tolist()
        t = [1 / (1 + math.exp(-(0.4 + 0.8 * one))) for one in drawn]
    eps = rng.normal(0, "eps", batch["position"], (3, 16, 16))
    errors = []
    for x0, e, time in zip(batch["image"], eps, t, strict=True):
        wanted = {"v": e - x0, "x0": x0, "epsilon": e}[prediction]
        said = G(((1 - time) * x0 + time * e)[None], torch.tensor([1000 * time]))[0]
        errors.append((said - wanted).square().mean())
    torch.testing.assert_close(losses[prediction], torch.stack(errors).mean())


def test_the_loss_of_edm_by_hand():
    """Equation 8, with the weight of the denoised image written out."""
    family = make("ddpm", prediction="edm", edm={"sigma_data": 0.4, "mean": -1.0, "std": 1.1})
    G, batch = moved(family), batch_of(random_images(), first=40)
    losses, _ = family.phases[0].losses(batch)
    assert set(losses) == {"edm"}
    drawn = rng.normal(0, "t", batch["position"], ()).tolist()
    eps = rng.normal(0, "eps", batch["position"], (3, 16, 16))
    errors = []
    for x0, e, normal in zip(batch["image"], eps, drawn, strict=True):
        sigma = math.exp(-1.0 + 1.1 * normal)
        total = sigma**2 + 0.4**2
        x = x0 + sigma * e
        said = G((x / math.sqrt(total))[None], torch.tensor([math.log(sigma) / 4]))[0]
        D = 0.4**2 / total * x + sigma * 0.4 / math.sqrt(total) * said
        errors.append(total / (sigma * 0.4) ** 2 * (D - x0).square().mean())
    torch.testing.assert_close(losses["edm"], torch.stack(errors).mean(), rtol=1e-4, atol=1e-5)


def test_the_loss_with_min_snr_by_hand():
    family = make("ddpm", prediction="v", min_snr=3.0, num_steps=100)
    G, batch = moved(family), batch_of(random_images(), first=40)
    losses, _ = family.phases[0].losses(batch)
    t = rng.integers(0, "t", batch["position"], high=100)
    eps = rng.normal(0, "eps", batch["position"], (3, 16, 16))
    errors = []
    for x0, e, step in zip(batch["image"], eps, t, strict=True):
        alpha_bar = float(family.schedule.alpha_bar[step])
        a, s = math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)
        said = G((a * x0 + s * e)[None], step[None])[0]
        snr = (a / s) ** 2
        errors.append(min(snr, 3.0) / (snr + 1) * (said - (a * e - s * x0)).square().mean())
    torch.testing.assert_close(losses["v"], torch.stack(errors).mean())


def best(family):
    """What a network says at best, if all pixels are independent N(MEAN, STD^2)."""

    def predict(x, t, share):
        if family.config.family.name == "flow":
            time = t.reshape(-1, 1, 1, 1) / 1000
            signal, noise = 1 - time, time
        else:
            sigma = (4 * t).exp().reshape(-1, 1, 1, 1)
            total = sigma.square() + 0.25
            x = x * total.sqrt()
            signal, noise = torch.ones_like(sigma), sigma
        variance = (signal * STD).square() + noise.square()
        x0 = MEAN + signal * STD**2 / variance * (x - signal * MEAN)
        eps = noise / variance * (x - signal * MEAN)
        prediction = family.options.prediction
        if prediction == "edm":
            return (x0 - 0.25 / total * x) / (0.5 * sigma / total.sqrt())
        return {"v": eps - x0, "x0": x0, "epsilon": eps}[prediction]

    return predict


@every_kind
def test_the_best_network_of_a_gaussian_gives_its_exact_samples_and_back(kind):
    family = of_kind(kind)
    latents = 0.3 * family.latents(torch.arange(4), seed=1)  # within the bounds of images
    found = family._integrate(best(family), latents, torch.arange(4), 1)
    expected = MEAN + STD * latents
    if family.options.prediction == "edm":
        # the walk begins at sigma_max, where the image is there still
        top = math.sqrt(80**2 + STD**2)
        expected = MEAN + STD * (80 * latents - MEAN) / top
    torch.testing.assert_close(found, expected, rtol=0, atol=0.01)
    torch.testing.assert_close(family._invert(best(family), found), latents, rtol=0, atol=0.01)


class Points(nn.Module):
    """A small denoiser of points in the plane, by frequencies of point and time."""

    def __init__(self, time_scale):
        super().__init__()
        self.time_scale = time_scale
        self.layers = nn.Sequential(
            nn.Linear(19, 96), nn.SiLU(), nn.Linear(96, 96), nn.SiLU(), nn.Linear(96, 2)
        )

    def forward(self, x, t):
        x, t = x.flatten(1), self.time_scale * t[:, None].float()
        angles = torch.cat([3 * x, 6 * x, t * torch.tensor([1.0, 2.0, 4.0, 8.0])], 1)
        return self.layers(torch.cat([x, t, angles.sin(), angles.cos()], 1))[..., None, None]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("flow", {}),
        ("flow", {"prediction": "x0", "sampler": "euler"}),
        ("flow", {"prediction": "epsilon", "times": "uniform"}),
        ("ddpm", {"prediction": "edm", "sample_steps": 20}),
        ("ddpm", {"prediction": "v", "min_snr": 5, "sample_steps": 40}),
    ],
    ids=str,
)
def test_eight_modes_are_covered(name, options):
    family = make(name, **options)
    angles = torch.arange(8) * (2 * math.pi / 8)
    modes = 0.7 * torch.stack([angles.cos(), angles.sin()], 1)
    torch.manual_seed(0)
    G = Points(1.0 if family.options.prediction == "edm" else 1e-3)
    optimizer = torch.optim.Adam(G.parameters())
    generator = torch.Generator().manual_seed(0)
    for step in range(400):
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * (1 - step / 400)
        chosen = torch.randint(8, (512,), generator=generator)
        x0 = modes[chosen] + 0.07 * torch.randn(512, 2, generator=generator)
        noised = family._noised(x0[..., None, None], torch.arange(512 * step, 512 * step + 512), "")
        optimizer.zero_grad()
        noised.loss(G(noised.x, noised.t)).backward()
        optimizer.step()
    latents = torch.randn(2000, 2, 1, 1, generator=generator)
    with torch.no_grad():
        points = family._integrate(lambda x, t, share: G(x, t), latents, torch.arange(2000), 0)
    shares = (torch.cdist(points.flatten(1), modes) < 0.2).float().mean(0)
    # what a small network leaves between the modes is less than a third
    assert shares.sum() > 2 / 3, shares
    assert shares.min() > 1 / 24 and shares.max() < 1 / 6, shares


@pytest.mark.parametrize("kind", ["flow", "flow midpoint", "edm"])
@pytest.mark.parametrize("steps", [1, 4])
def test_guidance_is_linear_in_what_is_said(kind, steps):
    """With one step of a flow from noise z, images are z - v."""
    family = of_kind(kind, num_classes=3, guidance=2.0, sample_steps=steps)
    G = Constant()
    family.sample({"G": G}, torch.arange(6), seed=0)
    assert (
        len(G.labels) == 2 * {"heun": 2 * steps - 1, "midpoint": 2 * steps}[family.options.sampler]
    )
    for without, given in zip(G.labels[::2], G.labels[1::2], strict=True):
        assert without.tolist() == [3] * 6 and given.tolist() == [0, 1, 2] * 2
    if steps == 1 and kind == "flow":
        latents = family.latents(torch.arange(6), 0)
        label = torch.arange(6)[:, None, None, None] % 3
        v = 0.4 + 2.0 * (0.1 * (label + 1) - 0.4)
        found = family.sample({"G": G}, torch.arange(6), seed=0)
        torch.testing.assert_close(found, (latents - v).clamp(-1, 1))


@pytest.mark.parametrize(
    ("name", "options", "shares"),
    [
        ("flow", {"sampler": "euler", "sample_steps": 5}, [0, 0.2, 0.4, 0.6, 0.8]),
        ("ddpm", {"num_steps": 50, "sample_steps": 5}, [0, 0.2, 0.4, 0.6, 0.8]),
        (
            "ddpm",
            {"prediction": "edm", "sampler": "euler", "sample_steps": 5},
            [0, 0.25, 0.5, 0.75, 1],
        ),
    ],
)
def test_guidance_acts_in_its_interval_alone(name, options, shares):
    family = make(name, num_classes=2, guidance=3.0, guidance_interval=[0.2, 0.6], **options)
    G = Constant()
    family.sample({"G": G}, torch.arange(2), seed=0)
    calls = [label.tolist() for label in G.labels]
    expected = []
    for share in shares:
        expected += [[2, 2], [0, 1]] if 0.2 <= share <= 0.6 else [[0, 1]]
    assert calls == expected


@pytest.mark.parametrize("kind", ["flow", "edm"])
def test_an_interval_of_all_is_none(kind):
    images = []
    for interval in (None, [0, 1], [0.9, 1]):
        more = {"num_classes": 2, "guidance": 3.0, "sample_steps": 8}
        family = of_kind(kind, **more, guidance_interval=interval)
        moved(family)
        images.append(family.sample(family.networks, torch.arange(2), seed=0))
    assert torch.equal(images[0], images[1]) and not torch.equal(images[0], images[2])


@every_kind
def test_a_sample_does_not_depend_on_the_rest_of_the_batch(kind):
    family = of_kind(kind, sample_steps=4, num_classes=2)
    moved(family)
    together = family.sample(family.networks, torch.arange(6), seed=3)
    some = family.sample(family.networks, torch.tensor([4, 1]), seed=3)
    torch.testing.assert_close(some, together[[4, 1]], rtol=1e-3, atol=1e-3)
    assert together.shape == (6, 3, 16, 16) and together.abs().max() <= 1


@every_kind
def test_sampling_can_be_changed_after_training(kind):
    family = of_kind(kind, num_classes=2)
    moved(family)
    other = family.with_sampling({"steps": 3, "sampler": "euler", "guidance": 1.5})
    assert other.G is family.G and family.options.sample_steps != 3
    first, second = (f.sample(f.networks, torch.arange(2), 0) for f in (family, other))
    assert not torch.equal(first, second)
    calls = Constant()
    other.sample({"G": calls}, torch.arange(2), 0)
    assert len(calls.labels) == 6


@pytest.mark.parametrize(
    ("name", "options", "named"),
    [
        ("flow", {"sampler": "ddim"}, "sampler: .*'euler', 'heun' or 'midpoint'"),
        ("flow", {"num_steps": 100}, "unknown key 'num_steps'"),
        ("flow", {"min_snr": 5}, "unknown key 'min_snr'"),
        ("flow", {"prediction": "edm"}, "prediction: .*'v', 'x0' or 'epsilon'"),
        ("flow", {"times_std": 0}, "times_std"),
        ("flow", {"times": "uniform", "times_mean": 0.5}, "times_mean 0.5 is of logit_normal"),
        ("flow", {"guidance_interval": [0.2, 0.8]}, "guidance_interval needs classes"),
        ("flow", {"num_classes": 2, "guidance_interval": [0.8, 0.2]}, "the smaller one first"),
        ("flow", {"num_classes": 2, "guidance_interval": [0, 2]}, "between 0 and 1"),
        ("flow", {"dit": {"size": "S"}}, "dit: belongs to network: dit"),
        ("flow", {"network": "dit", "base_channels": 64}, "base_channels belongs to network: unet"),
        ("flow", {"network": "dit", "unet": {}}, "unet belongs to network: unet"),
        ("flow", {"network": "dit", "dit": {"size": "S", "depth": 4}}, "size S says depth"),
        ("flow", {"network": "dit", "dit": {"width": 64, "depth": 4}}, "num_heads is missing"),
        ("flow", {"network": "dit", "dit": {"size": "M"}}, "dit.size"),
        ("ddpm", {"prediction": "edm", "min_snr": 5}, "min_snr: prediction edm has a loss weight"),
        ("ddpm", {"prediction": "edm", "sampler": "ddim"}, "take heun or euler"),
        ("ddpm", {"prediction": "edm", "schedule": "linear"}, "schedule: prediction edm has no"),
        ("ddpm", {"prediction": "edm", "num_steps": 50}, "num_steps: prediction edm has no"),
        ("ddpm", {"prediction": "edm", "edm": {"sigma_min": 90}}, "sigma_min 90.0 has to be less"),
        ("ddpm", {"edm": {}}, "edm: belongs to prediction: edm"),
        ("ddpm", {"sampler": "heun"}, "sampler heun belongs to prediction: edm"),
        ("ddpm", {"min_snr": 0}, "min_snr"),
    ],
    ids=str,
)
def test_options_that_contradict_are_refused_by_name(name, options, named):
    with pytest.raises(ConfigError, match=named):
        family_options(config_of(name, **options))


@pytest.mark.parametrize(
    ("dit", "named"),
    [
        ({"patch": 3}, "family.dit.patch 3"),
        ({"width": 10, "depth": 1, "num_heads": 3}, "family.dit.width 10"),
    ],
)
def test_a_transformer_that_does_not_fit_is_refused_by_name(dit, named):
    config = config_of("flow", network="dit", dit=dit)
    with pytest.raises(ConfigError, match=named):
        family_class(config.family)(config, config.stages[0], torch.device("meta"))


@pytest.mark.parametrize("dit", [None, {"size": "B", "patch": 4}])
def test_a_transformer_has_the_size_that_is_named(dit):
    config = config_of("flow", network="dit", dit=dit)
    family = family_class(config.family)(config, config.stages[0], torch.device("meta"))
    width, patch = (384, 2) if dit is None else (768, 4)
    assert len(family.G.blocks) == 12 and family.G.patches.weight.shape == (width, 3 * patch**2)


@pytest.mark.parametrize(
    ("name", "options"),
    [("ddpm", {"prediction": "edm"}), ("ddpm", {}), ("flow", {"network": "dit", "dit": {}})],
    ids=str,
)
def test_options_written_out_mean_the_same(name, options):
    """config.yaml holds every key, also those that a prediction has no use for."""
    first = family_options(config_of(name, **options))
    assert family_options(config_of(name, **first.model_dump(mode="json"))) == first


def test_edm_has_a_sampler_and_steps_of_its_own():
    found = family_options(config_of("ddpm", prediction="edm"))
    assert found.sampler == "heun" and found.sample_steps == 40
    given = family_options(config_of("ddpm", prediction="edm", sampler="euler", sample_steps=9))
    assert given.sampler == "euler" and given.sample_steps == 9
