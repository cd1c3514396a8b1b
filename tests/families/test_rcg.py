"""Images from a feature that is generated first: flow and ddpm with ``representation``."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dinogen import load_generator
from dinogen.config import ConfigError
from dinogen.distributed import rng
from dinogen.errors import UserError
from dinogen.evaluation.subject import _trained_with
from dinogen.families.abilities import graph_of
from dinogen.families.registry import family_class, family_options
from dinogen.features import GuideInfo
from dinogen.formats.export import export
from dinogen.formats.traced import write_onnx, write_torch_export
from dinogen.training.checkpointing.snapshot import load_snapshot
from dinogen.training.preflight import check_config, check_run
from dinogen.training.run import train
from dinogen.training.state import StageState
from shards.read.dataset import open_dataset
from tests.families.tiny import RESOLUTION, pack_discs, tiny_config

FAMILIES = ["ddpm-rcg", "flow-rcg"]
both = pytest.mark.parametrize("name", FAMILIES)
COLOURS = torch.tensor([[0.8, -0.6, -0.6], [-0.6, -0.6, 0.8]])
NUMBERS = torch.arange(5)
NUM_STEPS = 160
INFO = GuideInfo("dinov2", "here", None, "0" * 64, 32, [1], False).to_dict()


def build(name, tmp_path, *overrides, noise=0.1):
    """A tiny family away from what is zero at the start, in eval mode."""
    config = tiny_config(name, tmp_path / "data", tmp_path / "run", *overrides)
    torch.manual_seed(0)
    family = family_class(config.family)(config, config.stages[0], torch.device("cpu"))
    for network in family.networks.values():
        network.eval().requires_grad_(False)
        for value in network.parameters():
            value.add_(noise * torch.randn(value.shape))
    return family


def batch_of(num, seed=0, level=16, channels=32):
    generator = torch.Generator().manual_seed(seed)
    return {
        "image": torch.rand(num, 3, RESOLUTION, RESOLUTION, generator=generator) * 2 - 1,
        "position": torch.arange(num),
        "label": torch.arange(num) % 2,
        "pyramid": {level: torch.randn(num, level**2, channels, generator=generator)},
    }


def coloured(num, seed):
    """Images of one colour and some noise, whose feature says which; as a batch."""
    generator = torch.Generator().manual_seed(seed)
    which = (torch.rand(num, generator=generator) < 0.75).long()
    noise = 0.1 * torch.randn(num, 3, 8, 8, generator=generator)
    return which, {
        "image": COLOURS[which][:, :, None, None] + noise,
        "pyramid": {1: (10 + 4.0 * which[:, None, None] + torch.tensor([0.0, 1.0])).half()},
    }


@pytest.fixture(scope="module", params=["flow", "ddpm"])
def learnt(request, tmp_path_factory):
    """Both networks after some seconds of training on coloured images."""
    config = tiny_config(
        "flow-dit",
        *[tmp_path_factory.mktemp("learnt")] * 2,
        f"family={{name: {request.param}, prediction: x0, sample_steps: 8, network: dit}}",
        "family.dit={width: 32, depth: 2, num_heads: 2, patch: 4}",
        "family.representation={level: p1, channels: 2, width: 32, depth: 2, steps: 8}",
        "stages.0.resolution=8",
    )
    torch.manual_seed(0)
    family = family_class(config.family)(config, config.stages[0], torch.device("cpu"))
    family.R.mean.copy_(torch.tensor([13.0, 14.0]))
    family.R.std.fill_(1.73)
    optimizers = {
        name: torch.optim.Adam(net.parameters(), lr=3e-3) for name, net in family.networks.items()
    }
    for step in range(NUM_STEPS):
        _, batch = coloured(48, step)
        batch["position"] = torch.arange(48 * step, 48 * step + 48)
        for phase in family.phases:
            losses, _ = phase.losses(batch)
            optimizers[phase.network].zero_grad()
            sum(losses.values()).backward()
            optimizers[phase.network].step()
            for group in optimizers[phase.network].param_groups:
                group["lr"] = 3e-3 * (1 - step / NUM_STEPS)
    return family


@torch.no_grad()
def test_images_of_a_feature_have_its_colour(learnt):
    which, batch = coloured(64, 10**6)
    images = learnt.variations(learnt.networks, batch, torch.arange(64), 0)
    others = learnt.variations(learnt.networks, batch, torch.arange(64) + 64, 0)
    assert (images - others).abs().max() > 1e-3
    found = torch.cdist(images.mean((2, 3)), COLOURS)
    assert found.argmin(1).eq(which).float().mean() > 0.9
    assert found.amin(1).median() < 0.1


@torch.no_grad()
def test_samples_have_the_colours_of_the_data_as_often(learnt):
    images = learnt.sample(learnt.networks, torch.arange(200), 0)
    distances = torch.cdist(images.mean((2, 3)), COLOURS)
    assert (distances.amin(1) < 0.35).float().mean() > 0.9
    assert float(distances.argmin(1).float().mean()) == pytest.approx(0.75, abs=0.12)


@torch.no_grad()
def test_half_of_a_latent_is_of_the_feature_and_decides_the_colour(learnt):
    latents = learnt.latents(torch.arange(40), 0)
    assert latents.shape == (40, 3 * 8 * 8 + 2)
    plain = rng.normal(0, "sample", torch.arange(40), (3, 8, 8))
    assert torch.equal(latents[:, :-2], plain.flatten(1)), "as without representation"
    images = learnt.decode(learnt.networks, latents, torch.arange(40), 0)
    swapped = torch.cat([latents[:, :-2], latents[:, -2:].flip(0)], 1)
    others = learnt.decode(learnt.networks, swapped, torch.arange(40), 0)
    of_one, of_other = (torch.cdist(i.mean((2, 3)), COLOURS) for i in (images, others.flip(0)))
    clear = torch.maximum(of_one.amin(1), of_other.amin(1)) < 0.35
    assert clear.float().mean() > 0.8
    same = of_one.argmin(1)[clear] == of_other.argmin(1)[clear]
    assert same.float().mean() > 0.9, "all but features between the two"


@both
def test_what_is_dropped_sees_the_null_vector_and_no_class(name, tmp_path):
    family = build(name, tmp_path, "family.num_classes=2", "family.representation.dropout=0.5")
    batch = batch_of(32)
    found = family._conditions(batch, "", family.networks)
    keep = rng.uniform(0, "embedding", batch["position"]) >= 0.5
    assert 0 < keep.sum() < 32
    own = family.R.normalized(batch["pyramid"][16].mean(1))
    assert torch.equal(found.embedding[keep], own[keep])
    null = family.G.null_embedding
    assert null.abs().max() > 0
    assert torch.equal(found.embedding[~keep], null.expand(32, -1)[~keep])
    assert torch.equal(found.label[keep], batch["label"][keep])
    assert (found.label[~keep] == 2).all()
    held_out = family._conditions(batch, "/held-out", family.networks)
    assert not torch.equal(held_out.label, found.label), "draws of its own"


@both
def test_guidance_weighs_with_and_without_the_feature(name, tmp_path):
    family = build(name, tmp_path)
    x, t = torch.randn(2, 3, RESOLUTION, RESOLUTION), torch.tensor([7, 7])
    conditions = family._parted(family.networks, family.latents(torch.arange(2), 0), None)[1]
    with_it, without = family.G(x, t, None, None, conditions.embedding), family.G(x, t)
    assert (with_it - without).abs().max() > 1e-3
    for guidance in (0.0, 1.0, 2.5):
        guided = family.with_sampling({"guidance": guidance})
        expected = without + guidance * (with_it - without)
        found = guided._guided(family.G, conditions, x, t, 0.5)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@both
def test_held_out_measures_both_with_draws_of_its_own(name, tmp_path):
    family, batch = build(name, tmp_path), batch_of(6)
    found = family.held_out(family.networks, batch)
    assert set(found) == {"v", "representation"}
    assert found == family.held_out(family.networks, batch)
    R, G = family.phases
    assert (R.name, G.name, family.main_loss) == ("R", "G", "G")
    assert found["representation"] != R.losses(batch)[0]["representation"]
    assert found["v"] != G.losses(batch)[0]["v"]


@both
def test_losses_do_not_depend_on_how_the_batch_is_cut(name, tmp_path):
    family, batch = build(name, tmp_path, "family.num_classes=2"), batch_of(6)
    parts = [
        {k: {g: v[a : a + 2] for g, v in b.items()} if k == "pyramid" else b[a : a + 2]
         for k, b in batch.items()}
        for a in (0, 2, 4)
    ]  # fmt: skip
    for phase in family.phases:
        (whole,) = phase.losses(batch)[0].values()
        found = torch.stack([next(iter(phase.losses(part)[0].values())) for part in parts])
        torch.testing.assert_close(found.mean(), whole)


@both
def test_measured_images_have_features_of_their_classes(name, tmp_path):
    family = build(name, tmp_path, "family.num_classes=2")
    in_turn = family.sample(family.networks, NUMBERS, 3)
    assert torch.equal(family.measured(family.networks, NUMBERS, 3, None), in_turn)
    found = family.measured(family.networks, NUMBERS, 3, (1.0, 0.0))
    torch.testing.assert_close(found[0], in_turn[0])
    assert (found[1] - in_turn[1]).abs().max() > 1e-3


@both
def test_a_photo_has_no_latent(name, tmp_path):
    family = build(name, tmp_path)
    with pytest.raises(UserError, match=r"family\.representation: an image has no latent"):
        family.invert(family.networks, torch.zeros(1, 3, RESOLUTION, RESOLUTION), NUMBERS[:1])


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["family.guidance=2", "family.representation=null"], "set num_classes or representation"),
        (["family.guidance=2", "family.representation.dropout=0"], "dropout above 0"),
        (["family.representation.levle=p1"], "did you mean 'level'"),
        (["family.guidance_interval=[0.2, 0.8]", "family.representation=null"], "or features"),
    ],
)
@both
def test_options_that_contradict_each_other_are_refused(name, overrides, words, tmp_path):
    with pytest.raises(ConfigError, match=words):
        family_options(tiny_config(name, tmp_path / "data", tmp_path / "run", *overrides))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("family.representation.level=p1", "reads the level p1, .*prepare again with it"),
        ("family.representation.channels=384", "channels: 384, but level n16 .*set it to 32"),
    ],
)
def test_data_that_do_not_fit_are_refused_before_the_first_step(
    override, words, disc_data, tmp_path
):
    with pytest.raises(ConfigError, match=words):
        train(tiny_config("flow-rcg", disc_data, tmp_path / "run", override))


@pytest.fixture(scope="module")
def trained(disc_data, tmp_path_factory):
    """A run of each family."""
    runs = {}
    for name in FAMILIES:
        config = tiny_config(name, disc_data, tmp_path_factory.mktemp(name) / "run")
        train(config)
        runs[name] = config
    return runs


@both
def test_averages_and_checkpoints_hold_both_networks_and_the_statistics(name, trained, disc_data):
    snapshot = load_snapshot(trained[name].run)
    assert set(snapshot.ema.networks) == {"G", "R"}
    features = open_dataset(disc_data).level_mean("n16").mean(0)
    np.testing.assert_allclose(snapshot.ema.networks["R"].mean, features, rtol=1e-5)


@both
def test_an_exported_file_samples_without_run_and_data(name, trained, tmp_path):
    run = trained[name].run
    path = export(run, tmp_path / "first.safetensors").path
    expected = load_snapshot(run).sample(3, seed=5)
    found = load_generator(path)
    assert torch.equal(found.sample(3, seed=5), expected)
    assert set(found.networks) == {"G", "R"}
    assert found.info["network"]["name"] == "G"
    (further,) = found.info["further"].items()
    assert further[0] == "R" and further[1]["arguments"]["channels"] == 32
    with safe_open(path, "pt") as file:
        names = set(file.keys())
        assert json.loads(file.metadata()["dinogen"])["further"] == found.info["further"]
    assert {n for n in names if n.startswith("R/")} == {
        f"R/{n}" for n in found.networks["R"].state_dict()
    }
    again = export(path, tmp_path / "again.safetensors").path
    assert again.read_bytes() == path.read_bytes(), "of a file, the same file"


@pytest.mark.parametrize(
    ("further", "message"),
    [
        ({}, "holds G, but its family flow draws with G and R: export the run again"),
        ({"R": {}, "Q": {}}, "holds G and R and Q, but its family flow draws with G and R"),
        ("R", "its metadata name the network R, of which it holds no tensors"),
        (5, "no generator of dinogen"),
        ([["R"]], "no generator of dinogen"),
    ],
)
def test_a_file_whose_metadata_do_not_fit_is_named(further, message, trained, tmp_path):
    path = export(trained["flow-rcg"].run, tmp_path / "first.safetensors").path
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    if further == "R":
        tensors = {name: value for name, value in tensors.items() if not name.startswith("R/")}
    told = json.loads(metadata["dinogen"]) | {"further": further}
    save_file(tensors, path, metadata | {"dinogen": json.dumps(told)})
    with pytest.raises(ConfigError, match=f"first.safetensors: {message}"):
        load_generator(path)


def test_a_run_may_begin_from_an_exported_file(trained, disc_data, tmp_path):
    path = export(trained["flow-rcg"].run, tmp_path / "first.safetensors").path
    state = StageState(tiny_config("flow-rcg", disc_data, tmp_path / "run", f"init_from={path}"), 0)
    for name, network in load_generator(path).networks.items():
        for key, value in network.state_dict().items():
            for own in (state.family.networks[name], state.ema.networks[name]):
                assert torch.equal(own.state_dict()[key], value), (name, key)


@pytest.mark.parametrize("kind", ["pt2", "onnx"])
def test_the_graph_takes_the_embedding(kind, trained, tmp_path):
    """A walk by Euler's method around the exported graph gives the images of sample."""
    run = trained["flow-rcg"].run
    generator = load_generator(run)
    family = generator.family.with_sampling({"sampler": "euler"})
    graph = graph_of(family, generator.networks)
    given = graph.inputs(torch.arange(2), 5)
    assert list(given) == ["x", "t", "embedding"]
    path = tmp_path / f"G.{kind}"
    if kind == "pt2":
        write_torch_export(generator, path)
        program = torch.export.load(path).module()
    else:
        onnxruntime = pytest.importorskip("onnxruntime")
        write_onnx(generator, path)
        session = onnxruntime.InferenceSession(path)

        def program(*tensors):
            names = [one.name for one in session.get_inputs()]
            values = {n: v.numpy() for n, v in zip(names, tensors, strict=True)}
            return torch.from_numpy(session.run(None, values)[0])

    x, times = given["x"], graph.facts["times"]
    for now, then in itertools.pairwise(times):
        x = x + (then - now) * program(x, torch.full((2,), 1000 * now), given["embedding"])
    expected = family.sample(generator.networks, torch.arange(2), 5)
    torch.testing.assert_close(x.clamp(-1, 1), expected, rtol=1e-4, atol=1e-4)
    facts = graph.facts["embedding"]
    assert facts["level"] == "n16" and len(facts["mean"]) == len(facts["std"]) == 32
    null = torch.tensor([facts["null"]] * 2)
    times = torch.full((2,), 1000.0)
    expected = generator.network(given["x"], times)
    torch.testing.assert_close(program(given["x"], times, null), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("names", [("", "other"), ("other", ""), ("other", "third"), ("", "")])
def test_all_guides_of_features_are_told(names, tmp_path):
    infos = {name: INFO | {"name": f"net{name}", "random": name == "other"} for name in names}
    grids = {name: f"{name}.n4".removeprefix(".") for name in names}
    levels = [
        {level: np.full((16, 32), number + 1.0) for level in grids.values()} for number in range(24)
    ]
    further = {name: info for name, info in infos.items() if name}
    pack_discs(tmp_path / "data", levels, guide=infos.get("", {}), guides=further)
    overrides = (
        f"family.repa={{layer: 1, level: {grids[names[0]]}, channels: 32, hidden: 8}}",
        f"family.representation={{level: {grids[names[1]]}, channels: 32, width: 8, depth: 1}}",
    )
    config = tiny_config("flow-dit", tmp_path / "data", tmp_path / "run", *overrides)
    family = StageState(config, 0).family
    facts = family.describe()
    assert facts["guide"] == infos.get("", infos.get("other"))
    others = {name: info for name, info in infos.items() if info != facts["guide"]}
    assert facts.get("guides", {}) == others
    assert facts["random_guide"] is ("other" in names)
    assert all(info["name"] in facts["guide_label"] for info in infos.values())
    trained_with = _trained_with(family, facts)
    assert sorted(trained_with) == sorted({info["name"] for info in infos.values()})


def test_two_kinds_of_one_grid_are_refused_by_both_names(tmp_path):
    overrides = (
        "family.repa={layer: 1, level: n4, channels: 32, hidden: 8}",
        "family.representation={level: p4, channels: 32, width: 8, depth: 1}",
    )
    config = tiny_config("flow-dit", tmp_path / "data", tmp_path / "run", *overrides)
    words = r"family\.repa\.level, family\.representation\.level: n4 and p4 are of the same guide"
    with pytest.raises(ConfigError, match=words):
        check_config(config, [0])


def test_channels_are_compared_before_a_job_is_queued(disc_data, tmp_path):
    overrides = ("family.representation.channels=384",)
    config = tiny_config("flow-rcg", disc_data, tmp_path / "run", *overrides)
    with pytest.raises(ConfigError, match=r"channels: 384, but level n16 .*set it to 32"):
        check_run(config, [0], open_dataset(disc_data))


@pytest.mark.parametrize("random", [True, False])
def test_a_random_clip_is_told(random, tmp_path):
    values = np.random.default_rng(0).normal(size=(24, 1, 6)).astype(np.float16)
    made_by = {"name": "clip", "path": "here", "weights_sha256": "0" * 64, "random": random}
    pack_discs(tmp_path / "data", [{"clip": value} for value in values], clip=made_by)
    overrides = ["family.representation.level=clip", "family.representation.channels=6"]
    config = tiny_config("flow-rcg", tmp_path / "data", tmp_path / "run", *overrides)
    facts = StageState(config, 0).family.describe()
    assert facts["clip"] == made_by and facts.get("random_guide", False) is random


def test_clip_is_a_level_too(tmp_path):
    generator = np.random.default_rng(0)
    levels = [{"clip": generator.normal(size=(1, 6)).astype(np.float16)} for _ in range(24)]
    pack_discs(tmp_path / "data", levels)
    overrides = ["family.representation.level=clip", "family.representation.channels=6"]
    config = tiny_config("flow-rcg", tmp_path / "data", tmp_path / "run", *overrides)
    train(config)
    assert load_snapshot(config.run).sample(2, seed=0).shape == (2, 3, RESOLUTION, RESOLUTION)
