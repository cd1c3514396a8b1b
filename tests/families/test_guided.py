"""The guided family: the levels it reads, when it has collapsed, its optional discriminator."""

from __future__ import annotations

import pytest
import torch

from dinogen.config import ConfigError
from dinogen.families.guided import Guided
from dinogen.families.registry import resolve
from dinogen.features.dinov2 import make_random_dinov2
from dinogen.training.checkpointing.checkpoint import newest_checkpoint
from dinogen.training.data import open_data
from dinogen.training.preflight import check_run
from dinogen.training.run import train
from dinogen.training.state import StageState
from tests.families.tiny import tiny_config
from tests.guidance.conftest import two_guides  # noqa: F401
from tests.guidance.runs import (
    ADVERSARIES,
    PROJECTED,
    adversary_config,
    objective_config,
    train_adversaries,
)
from tests.training.on_ranks import on_ranks

TINY_DINO = {"hidden_size": 24, "num_layers": 2, "num_heads": 2, "image_size": 42}


def built(tmp_path, *overrides):
    config = tiny_config("guided", tmp_path / "data", tmp_path / "run", *overrides)
    return Guided(config, config.stages[-1], torch.device("cpu"))


def tensors(folder):
    found = newest_checkpoint(folder / "16x16" / "checkpoints")
    assert found is not None
    names = sorted(path.stem for path in found.folder.glob("*.safetensors"))
    return {f"{n}/{k}": v for n in names for k, v in found.tensors(n).items()}


def test_it_reads_the_levels_of_all_guides(tmp_path):
    guides = "guides={pixels: {name: pixels}}"
    assert built(tmp_path, guides).inputs.levels == ("n16", "pixels.n16")
    assert built(tmp_path, guides, "family.pyramid=pooled").inputs.levels == ("p16", "pixels.p16")
    larger = ["stages.0.resolution=32", guides, "family.grids={main: [8, 4], pixels: [8]}"]
    assert built(tmp_path, *larger).inputs.levels == ("p8", "p4", "pixels.p8")
    larger[-1] = "family.grids={main: [16], pixels: [32, 8]}"
    assert built(tmp_path, *larger).inputs.levels == ("p16", "pixels.n32", "pixels.p8")


def test_one_objective_may_be_named_alone():
    options = Guided.Options(objective="energy")
    assert [term.name for term in options.objectives] == ["energy"]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["family.objectives=[{name: enrgy}]"], "objectives.0.*enrgy"),
        (["family.objectives=[{name: energy, wieght: 2}]"], "did you mean 'weight'"),
        (["family.objectives=[{name: energy, guides: [clip]}]"], "there is no guide clip"),
        (["family.grids={pixel: [8]}"], "there is no guide pixel"),
        (["family.grids={main: []}"], "grids.main"),
        (
            ["family.objectives=[{name: mse}]", "family.reference_batch=8"],
            "family.reference_batch",
        ),
        (
            ["family.objectives=[{name: mmd}]", "family.reference_batch=1"],
            "family.reference_batch must be >= 2",
        ),
        (["family.objectives=[{name: energy}]", "stages.0.batch=1"], "must be >= 2"),
        (["family.objectives=[{name: energy}, {name: paired}]"], "combined with paired: otherwise"),
        (["family.objectives=[{name: energy}]", "family.text={}"], "combined with text: otherwise"),
        (
            [
                "family.objectives=[{name: energy, views: [location]}]",
                "family.text={clip_weight: 0}",
            ],
            "learn to ignore it",
        ),
        (["family.discriminator={from_resolution: 32}"], "all stages are smaller"),
        (["family.discriminator={patch_scales: 1}"], "leave out patch_scales, or set kind: patch"),
        (["family.discriminator={kind: patch, grid: 8}"], "leave out grid, or set kind"),
        (["guides={main: {name: pixels}}"], "not clip, latents, main"),
        (["family.objectives=[{name: paired, num_latents: 8}]"], "must be > z_dim 8"),
        (
            [
                "family.objectives=[{name: paired, num_latents: 9}]",
                "family.text={embed_dim: 4}",
            ],
            "cannot be combined with text",
        ),
        (["family.objectives=[{name: paired}, {name: paired}]"], "paired at most once"),
    ],
)
def test_mistakes_are_named(overrides, words, tmp_path):
    with pytest.raises(ConfigError, match=words):
        resolve(tiny_config("guided", tmp_path / "data", tmp_path / "run", *overrides))
        built(tmp_path, *overrides)


def test_a_reference_batch_is_read_in_each_step(two_guides, tmp_path):  # noqa: F811
    """Another reference batch gives other weights; all microbatches use the same one."""
    runs = {
        "reference": ["family.reference_batch=6"],
        "parts": ["family.reference_batch=6", "engine.micro_batch=3"],
        "none": [],
    }
    found = {}
    for name, overrides in runs.items():
        train(objective_config(two_guides, tmp_path / name, "energy", *overrides))
        found[name] = tensors(tmp_path / name / "energy")["G/dense.weight"]
    torch.testing.assert_close(found["parts"], found["reference"], rtol=1e-3, atol=2e-5)
    assert (found["reference"] - found["none"]).abs().max() > 1e-4


def test_a_factor_for_a_network_of_no_stage_is_refused(two_guides, tmp_path):  # noqa: F811
    config = objective_config(two_guides, tmp_path, "energy", "optim.lr_scale={D: 2}")
    with pytest.raises(ConfigError, match="there is no network D: the family's are G"):
        train(config)


def test_a_reference_batch_smaller_than_the_ranks_is_refused(two_guides, tmp_path, monkeypatch):  # noqa: F811
    config = objective_config(two_guides, tmp_path, "energy", "family.reference_batch=2")
    monkeypatch.setattr("dinogen.distributed.process_group.world_size", lambda: 3)
    with pytest.raises(
        ConfigError, match=r"family\.reference_batch: 2 is smaller than the number of ranks, 3"
    ):
        check_run(config, [0], open_data(config))


def test_with_a_reference_batch_it_resumes_bitwise(two_guides, tmp_path):  # noqa: F811
    given = ["family.reference_batch=6", "checkpoint.every_kimg=0.008"]
    train(objective_config(two_guides, tmp_path / "whole", "drift", *given))
    train(objective_config(two_guides, tmp_path / "cut", "drift", *given, "stages.0.kimg=0.008"))
    train(objective_config(two_guides, tmp_path / "cut", "drift", *given))
    want, found = tensors(tmp_path / "whole/drift"), tensors(tmp_path / "cut/drift")
    assert [k for k, v in want.items() if not torch.equal(v, found[k])] == []


@pytest.fixture(scope="module")
def adversaries(two_guides, tmp_path_factory):  # noqa: F811
    out = tmp_path_factory.mktemp("adversaries")
    train_adversaries(two_guides, out, {"whole": []})
    return out / "whole"


def test_a_discriminator_is_trained(adversaries):
    for name in ADVERSARIES:
        files = {key.partition("/")[0] for key in tensors(adversaries / name)}
        assert {"G", "G.ema", "D", "optim"} <= files


def test_with_a_discriminator_it_goes_on_bitwise(adversaries, two_guides, tmp_path):  # noqa: F811
    train_adversaries(two_guides, tmp_path, {"cut": ["stages.0.kimg=0.016"]})
    train_adversaries(two_guides, tmp_path, {"cut": []})
    for name in ADVERSARIES:
        want, found = tensors(adversaries / name), tensors(tmp_path / "cut" / name)
        assert [k for k, v in want.items() if not torch.equal(v, found[k])] == [], name


def test_ranks_and_parts_with_a_discriminator_train_as_one(
    adversaries,
    two_guides,  # noqa: F811
    tmp_path,
):
    ways = {"ddp": ["engine.micro_batch=2"], "deepspeed": ["engine.name=deepspeed"]}
    on_ranks(2, train_adversaries, two_guides, tmp_path, ways)
    for way in ways:
        for name in ADVERSARIES:
            want, found = tensors(adversaries / name), tensors(tmp_path / way / name)
            for key, value in want.items():
                torch.testing.assert_close(
                    found[key], value, rtol=2e-3, atol=5e-5, msg=f"{way} {name} {key}"
                )


def test_a_stage_may_be_the_first_with_a_discriminator(two_guides, tmp_path):  # noqa: F811
    length = "kimg: 0.016, batch: 8"
    stages = f"stages=[{{resolution: 8, {length}}}, {{resolution: 16, {length}}}]"
    given = [stages, "optim.lr_scale={D: 2}"]  # of a network that the first stage lacks
    train(adversary_config(two_guides, tmp_path, "patch", *given))
    before = newest_checkpoint(tmp_path / "patch" / "8x8" / "checkpoints")
    assert before is not None
    assert not before.holds("D")
    assert any(key.startswith("D/") for key in tensors(tmp_path / "patch"))


def test_what_it_looks_through_may_not_become_another(two_guides, tmp_path):  # noqa: F811
    def go_on(*more):
        own = {**PROJECTED, "guide": {"name": "dinov2", "path": str(tmp_path / "dinov2")}}
        given = [f"family.discriminator={own}", *more]
        return train(adversary_config(two_guides, tmp_path, "projected", *given))[-1]

    make_random_dinov2(tmp_path / "dinov2", seed=0, **TINY_DINO)
    first = go_on("stages.0.kimg=0.016")
    assert go_on("stages.0.kimg=0.024")["nimg"] == first["nimg"] + 8
    (tmp_path / "dinov2").rename(tmp_path / "before")
    make_random_dinov2(tmp_path / "dinov2", seed=1, **TINY_DINO)
    with pytest.raises(ConfigError, match=r"family\.discriminator\.guide: its weights differ"):
        go_on("stages.0.kimg=0.032")


def test_the_weight_ramps_from_the_stages_start(two_guides, tmp_path):  # noqa: F811
    state = StageState(adversary_config(two_guides, tmp_path, "patch"), 0)
    state.family.start = 800
    batch = state.data.read(range(8), image_size=16, levels=state.family.inputs.levels)
    found = []
    for step in (0, 1, 5):
        batch["position"] = torch.arange(8) + 800 + 8 * step
        losses, report = state.family.phases[-1].losses(batch)
        found.append(float(report["adversarial_weight"]))
        assert "adversarial" in losses
    assert found == pytest.approx([0.0, 0.5, 1.0])


def test_held_out_energy_is_a_mean_over_held_out_images(two_guides, tmp_path):  # noqa: F811
    """Of ``mse`` too, so that objectives can be compared; any parts have the same mean."""
    config = objective_config(two_guides, tmp_path, "mse")
    state = StageState(config, 0)
    levels = state.family.inputs.levels
    networks = {"G": state.family.networks["G"]}
    with torch.no_grad():
        whole, one, two = (
            state.family.held_out(networks, state.data.read(numbers, split="val", levels=levels))
            for numbers in ([0, 1, 2, 3, 4], [0], [1, 2, 3, 4])
        )
    assert set(whole) == {"mse", "energy"}
    assert float(whole["energy"]) == pytest.approx(
        (float(one["energy"]) + 4 * float(two["energy"])) / 5, rel=1e-4
    )
