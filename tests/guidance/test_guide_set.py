"""The public API of guidance: guide sets and objectives in a loop of your own, without a config."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

import dinogen
from dinogen.config import ConfigError
from dinogen.features.base import GuideError
from dinogen.guidance.guides import load_guides
from dinogen.guidance.objectives import Drift, Energy, Mmd, Mse, Paired, SlicedWasserstein
from dinogen.guidance.options import GuidedOptions
from dinogen.guidance.weighted import WeightedObjectives
from dinogen.losses.distributions import distances, mean_of_pairs
from shards.errors import ManifestError
from tests.families.tiny import tiny_config

CPU = torch.device("cpu")
LEVELS = ("n16", "pixels.n8")


@pytest.fixture(scope="module")
def guide(two_guides):
    return dinogen.load_guide("dinov2", path=two_guides.parent / "guide")


@pytest.fixture(scope="module")
def data(two_guides):
    return dinogen.open_dataset(str(two_guides))


@pytest.fixture(scope="module")
def both(guide):
    return {"main": guide, "pixels": dinogen.load_guide("pixels", CPU)}


@pytest.fixture
def images():
    rng = torch.Generator().manual_seed(0)
    return (torch.rand(6, 3, 16, 16, generator=rng) * 2 - 1).requires_grad_()


def test_generated_and_real_features_have_the_same_form(both, data, images):
    guides = dinogen.GuideSet(both, data, LEVELS)
    with data.stream(batch_size=4, levels=guides.levels) as stream:
        real = guides.real(next(stream))
    generated = guides(images)
    assert tuple(real) == tuple(generated) == guides.levels == LEVELS
    for level in LEVELS:
        assert real[level].dtype == generated[level].dtype == torch.float32
        assert real[level].shape[1:] == generated[level].shape[1:]
    assert [len(values) for values in (*real.values(), *generated.values())] == [4, 4, 6, 6]


def test_channels_vary_by_one_over_the_data(both, data):
    guides = dinogen.GuideSet(both, data, LEVELS)
    everything = guides.read_real(1000)
    variance = everything["n16"].var(0, correction=0).mean(0)
    scales = guides.scales["n16"]
    # All but the channels that hardly vary, which are not scaled further than the limit.
    free = scales < 0.99 * scales.max()
    torch.testing.assert_close(variance[free], torch.ones(int(free.sum())), rtol=2e-2, atol=0)
    raw = dinogen.GuideSet(both, data, LEVELS, normalize=False).read_real(1000)
    torch.testing.assert_close(everything["n16"], raw["n16"] * scales)


def test_by_default_it_takes_all_levels_of_its_guides(both, guide, data):
    assert set(dinogen.GuideSet({"main": guide}, data).levels) == {"n8", "n16"}
    assert set(dinogen.GuideSet(both, data).levels) == {"n8", "n16", "pixels.n8", "pixels.n16"}


def test_the_loss_is_that_of_plain_autograd(both, data, images):
    """Energy by its definition, with no block and no cached gradient in between."""
    guides = dinogen.GuideSet(both, data, LEVELS)
    real = guides.read_real(9)
    loss = Energy(weight=0.5)(guides(images), real)
    (found,) = torch.autograd.grad(loss, images)
    total = torch.zeros(())
    generated = guides(images)
    for level in LEVELS:
        for ours, theirs in (
            (generated[level].transpose(0, 1), real[level].transpose(0, 1)),
            (generated[level].flatten(1)[None], real[level].flatten(1)[None]),
        ):
            own = mean_of_pairs(distances(ours, ours))
            total = total + (2 * distances(ours, theirs).mean() - own) / 8
    (want,) = torch.autograd.grad(total, images)
    assert float(loss.detach()) == pytest.approx(float(total.detach()), rel=1e-5)
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("objective", [Energy(), Mmd(), Drift(), SlicedWasserstein(), Mse()])
def test_it_is_what_the_family_trains(objective, both, data, images):
    """The same numbers from raw features and scales, as `WeightedObjectives` has them."""
    batch = data.read(range(6), levels=LEVELS)
    guides = dinogen.GuideSet(both, data, LEVELS)
    raw = dinogen.GuideSet(both, data, LEVELS, normalize=False)
    if isinstance(objective, Mse):
        objective = Mse(normalize=True)
    family = WeightedObjectives([objective], raw, 0, 6, "train", lambda _: raw(images))
    want = sum(family.losses(batch, raw(images))[0].values())
    if isinstance(objective, SlicedWasserstein):
        from dinogen.distributed import rng

        def directions(size, number):
            return rng.normal(0, "slices", torch.tensor([0]), (size, number))[0]

        found = objective(guides(images), guides.real(batch), directions)
    else:
        found = objective(guides(images), guides.real(batch))
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-6)
    gradients = [torch.autograd.grad(loss, images)[0] for loss in (found, want)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-7)


def test_directions_come_from_torchs_generator(both, data, images):
    guides = dinogen.GuideSet(both, data, LEVELS)
    losses = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        losses.append(SlicedWasserstein()(guides(images), guides.read_real(6)).item())
    assert losses[0] == losses[1] != losses[2]


def test_the_floor_is_that_of_real_samples(both, data):
    real = dinogen.GuideSet(both, data, LEVELS).read_real(20)
    floor = Energy(weight=2, views=("global",), guides=("pixels",)).floor(real)
    flat = real["pixels.n8"].flatten(1)[None]
    assert floor == pytest.approx(2 * float(mean_of_pairs(distances(flat, flat))), rel=1e-5)
    assert Drift().floor(real) is None


def test_a_generator_learns_from_it(both, data):
    """A few steps on the pixels alone come nearer to the data."""
    guides = dinogen.GuideSet(both, data, ("pixels.n8",))
    torch.manual_seed(0)
    G = torch.nn.Sequential(torch.nn.Linear(8, 192), torch.nn.Unflatten(1, (3, 8, 8)))
    optimizer = torch.optim.Adam(G.parameters(), lr=1e-2)
    losses = []
    with data.stream(batch_size=8, levels=guides.levels) as stream:
        for _, batch in zip(range(30), stream, strict=False):
            loss = Energy()(guides(G(torch.randn(8, 8)).tanh()), guides.real(batch))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_mistakes_of_a_guide_set_are_named(both, guide, data, tmp_path):
    with pytest.raises(ValueError, match=r"pixels\.n8: there is no guide pixels"):
        dinogen.GuideSet({"main": guide}, data, LEVELS)
    with pytest.raises(ValueError, match="none of them belongs to clip"):
        dinogen.GuideSet({"clip": guide}, data)
    with pytest.raises(ManifestError, match="has no level n4"):
        dinogen.GuideSet({"main": guide}, data, ("n4",))
    guides = dinogen.GuideSet(both, data, LEVELS)
    with pytest.raises(ValueError, match=r"lacks some of the levels n16, pixels\.n8: read it with"):
        guides.real(data.read([0, 1], levels=["n16"]))
    with pytest.raises(ConfigError, match=r"guide: not the one .*\(name pixels instead of dinov2"):
        dinogen.GuideSet({"main": both["pixels"]}, data, ("n8",))


def test_mistakes_in_a_loss_are_named():
    features = {"n8": torch.zeros(4, 64, 3)}
    with pytest.raises(ValueError, match=r"Energy: no features to compare: .* n8, .* p8, .* all"):
        Energy()(features, {"p8": torch.zeros(4, 64, 3)})
    with pytest.raises(ValueError, match=r"Mse: no features to compare: .* guides are pixels"):
        Mse(guides=("pixels",))(features, features)
    with pytest.raises(ValueError, match="Energy: needs at least 2 generated samples"):
        Energy()({"n8": torch.zeros(1, 64, 3)}, features)
    with pytest.raises(ValidationError, match="widths"):
        Drift(widths=(-1,))
    with pytest.raises(ValidationError, match="num_slices"):
        SlicedWasserstein(num_slices=0)


def test_all_public_names_are_there():
    assert {"GuideSet", "Run", "load_guide", "objectives", "open_dataset"} <= set(dinogen.__all__)
    for name in dinogen.__all__:
        assert getattr(dinogen, name) is not None
    for name in dinogen.objectives.__all__:
        assert getattr(dinogen.objectives, name).__doc__


def test_guides_are_loaded_by_plain_arguments(two_guides, guide):
    assert guide.info.path == str(two_guides.parent / "guide")
    assert dinogen.load_guide("dinov2", "cpu", path=two_guides.parent / "guide", layer=[1])
    with pytest.raises(ConfigError, match=r"guide: name: .*'dinov2'"):
        dinogen.load_guide("dino")
    with pytest.raises(GuideError, match=r"guide\.layer: 3"):
        dinogen.load_guide("pixels", layer=3)
    with pytest.raises(GuideError, match=r"guide\.path"):
        dinogen.load_guide("dinov2", path=two_guides / "nowhere")
    config = tiny_config("guided", two_guides, two_guides)
    with pytest.raises(TypeError, match="path: a config has it already"):
        dinogen.load_guide(config.guide, path="elsewhere")


def test_the_guides_of_a_config_have_its_names(two_guides, tmp_path):
    config = tiny_config("guided", two_guides, tmp_path, "guides={pixels: {name: pixels}}")
    assert list(load_guides(config, LEVELS, CPU)) == ["main", "pixels"]
    assert list(load_guides(config, LEVELS[1:], CPU)) == ["pixels"]


def test_keys_of_earlier_versions_are_read():
    earlier = {"objectives": [{"name": "energy", "views": ["place", "map"]}], "bank": 6}
    today = {"objectives": [{"name": "energy"}], "reference_batch": 6}
    assert GuidedOptions(**earlier) == GuidedOptions(**today)
    assert Drift(views=("map",)) == Drift()
    assert GuidedOptions(objective="paired").objectives == (Paired(),)
    with pytest.raises(ValidationError, match="bank"):
        GuidedOptions(**earlier, reference_batch=6)
