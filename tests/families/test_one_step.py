"""guided with a transformer: classes, batches by class, and guidance as an input."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch

from dinogen.config import ConfigError
from dinogen.errors import UserError
from dinogen.families import guided
from dinogen.families.abilities import adjustable
from dinogen.families.base import classes_of
from dinogen.families.guided import Guided
from dinogen.training.checkpointing.checkpoint import newest_checkpoint
from dinogen.training.dataloading import Dataloader
from dinogen.training.engines import base
from dinogen.training.preflight import check_run
from dinogen.training.run import train
from dinogen.training.state import StageState
from dinogen.visualize.samples import SampleRequest, write_samples
from shards import open_dataset, pack
from tests.families.tiny import BATCH, tiny_config

NAME = "guided-dit"
CLASSES = (
    "family.num_classes=0",
    "family.guidance_range=[1, 1]",
    "family.guidance=1",
    "family.samples_per_class=16",
)


def built(tmp_path, *overrides, name=NAME):
    config = tiny_config(name, tmp_path / "data", tmp_path / "run", *overrides)
    return Guided(config, config.stages[-1], torch.device("cpu"))


def disturbed(family):
    """A family whose generator tells its inputs apart, as after training."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in family.G.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return family


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["family.generator=progressive"], "dit: belongs to generator: dit"),
        (["family.generator=progressive", "family.dit=null"], "only generator: dit has classes"),
        (["family.text={}", "clip.path=x"], "generator: dit takes no text"),
        (
            [
                "family.objectives=[{name: paired, num_latents: 24}, {name: drift}]",
                "family.z_dim=8",
            ],
            "takes no learnt latents",
        ),
        (["family.dit.patch=3"], "family.dit.patch 3 does not divide the resolution 16"),
        (["family.dit.width=18"], "family.dit.width 18 has to be a multiple"),
        (["family.samples_per_class=3"], "batch 8 is not a multiple of family.samples_per_class 3"),
        (["family.guidance=5"], r"family.guidance 5.0 is not in guidance_range \[1.0, 4.0\]"),
        (["family.guidance_range=[0.5, 4]"], "two strengths from 1 on"),
        (["family.reference_batch=0"], "reference_batch must be > 0 with guidance_range"),
        (["family.guidance_range=[1, 1]", "family.guidance=1"], "only guidance reads it"),
        (["family.objectives=[{name: mse}]"], "none of family.objectives compares distributions"),
        (["family.objectives=[{name: energy}]"], "energy cannot be guided"),
        (["family.num_classes=0", "family.samples_per_class=16"], "needs classes to guide to"),
        (["family.guidance_range=[1, .inf]"], "(?s)guidance_range.1.*finite"),
        (["family.guidance_power=.inf"], "(?s)guidance_power.*finite"),
        (["family.z_dim=7"], "z_dim: only generator: progressive reads it"),
        (["family.channel_base=7"], "channel_base: only generator: progressive reads it"),
        (["family.channel_max=7"], "channel_max: only generator: progressive reads it"),
        ([*CLASSES, "family.samples_per_class=8"], "samples_per_class: only num_classes reads it"),
        ([*CLASSES, "family.guidance_power=2"], "guidance_power: only guidance_range reads it"),
        (
            ["family.guidance_range=[1, 1]", "family.guidance=1", "family.guidance_power=2"],
            "guidance_power: only guidance_range reads it",
        ),
        (
            ["family.objectives=[{name: drift}, {name: paired}]"],
            "paired cannot be combined with num_classes",
        ),
        (
            [
                "family.objectives=[{name: drift}, {name: paired}]",
                "family.reference_batch=0",
                "family.guidance_range=[1, 1]",
                "family.guidance=1",
            ],
            "paired cannot be combined with num_classes",
        ),
        (
            [
                "stages=[{resolution: 16, kimg: 1, batch: 8, lr: 0.1}, "
                "{resolution: 32, kimg: 1, fade_kimg: 0.5, batch: 8, lr: 0.1}]"
            ],
            "no new block to fade in",
        ),
        (
            [
                "stages.0.resolution=32",
                "family.grids={main: [16, 7]}",
            ],
            "drift, n7: view patches: a grid of 7x7",
        ),
    ],
)
def test_what_does_not_fit_is_one_error(overrides, words, tmp_path):
    with pytest.raises((ConfigError, UserError, ValueError), match=words):
        built(tmp_path, *overrides)


@pytest.mark.parametrize("more", [(), CLASSES])
def test_a_config_written_whole_still_loads(more, tmp_path):
    family = built(tmp_path, *more)
    whole = family.options.model_dump(mode="json")
    assert whole["z_dim"] == 512 and whole["samples_per_class"] in (4, 16)
    assert Guided.Options(**whole) == family.options


def test_each_run_of_a_batch_is_of_one_class_wherever_training_resumes(disc_data, tmp_path):
    config = tiny_config(NAME, disc_data, tmp_path, "family.samples_per_class=2")
    state = StageState(config, 0)
    seen = []
    with Dataloader(state) as loader:
        for _ in range(3):
            batch = next(loader).batch
            labels = batch["label"].view(4, 2)
            assert torch.equal(labels[:, 0], labels[:, 1])
            assert sorted(labels[:2, 0].tolist()) == sorted(labels[2:, 0].tolist()) == [0, 1]
            assert len(batch["reference_batch"]["key"]) == 6
            seen.append(batch["key"])
    state.progress.nimg += 2 * BATCH
    with Dataloader(state) as loader:
        assert next(loader).batch["key"] == seen[2]


def test_the_generator_is_told_the_class_and_the_strength_of_its_group(disc_data, tmp_path):
    state = StageState(tiny_config(NAME, disc_data, tmp_path), 0)
    told = []
    state.family.G.register_forward_pre_hook(lambda _, arguments: told.append(arguments))
    with Dataloader(state) as loader:
        batch = next(loader).batch
    state.family.phases[-1].losses(batch)
    ((z, label, guidance),) = told
    assert z.shape == (BATCH, 3, 16, 16)
    assert torch.equal(label, batch["label"])
    assert torch.equal(guidance, state.family.training.classes.guidance(batch["position"]))


def with_labels(source, folder, labels, **more):
    """Packed samples of a dataset, those of each split with these labels, which are repeated."""
    data = open_dataset(source)
    own = data.manifest
    samples = [
        dataclasses.replace(data.sample(number, split), label=labels[number % len(labels)])
        for split in ("train", "val")
        for number in range(data.num_samples(split))
    ]
    found = {"shard_size": 8, "val_fraction": 0.25, "guide": own.guide, "guides": own.guides}
    pack(samples, folder, **found, **more)
    return folder


def test_held_out_energy_is_of_the_classes_of_the_data_without_guidance(
    disc_data, tmp_path, monkeypatch
):
    data = with_labels(disc_data, tmp_path / "data", [0, 0, 0, 0, 0, 1])
    monkeypatch.setattr(guided, "_HELD_OUT", 12)
    guide = f"guide.path={disc_data.parent / 'guide'}"
    state = StageState(tiny_config(NAME, data, tmp_path / "run", guide), 0)
    family = disturbed(state.family)
    levels = family.inputs.levels
    batch = state.data.read(range(4), split="val", levels=levels, need_labels=True)
    with torch.no_grad():
        found = family.held_out(family.networks, batch)["energy"]
        numbers = torch.arange(12)
        num = state.data.num_samples()
        label = classes_of(numbers, (num - num // 6, num // 6))
        z = family.latents(numbers, state.config.seed)
        images = family.G(z, label, torch.ones(12)).clamp(-1, 1)
        training = family.training
        want = training.objectives.held_out_distributions(training.guides(images), batch)
    assert 0 < label.sum() < 4
    torch.testing.assert_close(found, want["energy"])


def test_a_class_without_training_samples_is_refused(disc_data, tmp_path, caplog):
    guide = f"guide.path={disc_data.parent / 'guide'}"
    more = (guide, "family.num_classes=3", "family.samples_per_class=4")
    names = ("ant", "bee", "cat")
    data = with_labels(disc_data, tmp_path / "two", [0, 2], classes=names)
    config = tiny_config(NAME, data, tmp_path / "run", *more)
    with pytest.raises(ConfigError, match=r"family.num_classes: split train.* of class 1 \(bee\)"):
        train(config)
    # classes in turn need no photo of each
    check_run(tiny_config("ddpm-dit", data, tmp_path / "run", more[1]), [0], open_dataset(data))
    assert "fewer samples" not in caplog.text
    data = with_labels(disc_data, tmp_path / "few", [1, 2, 1] + [0] * 21, classes=names)
    check_run(tiny_config(NAME, data, tmp_path / "run", *more), [0], open_dataset(data))
    assert caplog.text.count("fewer samples than family.samples_per_class=4") == 1
    assert "class 1 (bee): 2, 2 (cat): 1" in caplog.text


def test_samples_follow_class_and_guidance(tmp_path):
    family = disturbed(built(tmp_path))
    numbers = torch.arange(4)
    z = family.latents(numbers, 0)
    plain = family.sample(family.networks, numbers, 0)
    want = family.G(z, torch.tensor([0, 1, 0, 1]), torch.full((4,), 1.5)).clamp(-1, 1)
    torch.testing.assert_close(plain, want)
    stronger = family.with_sampling({"guidance": 3.0})
    want = family.G(z, torch.tensor([0, 1, 0, 1]), torch.full((4,), 3.0)).clamp(-1, 1)
    torch.testing.assert_close(stronger.sample(family.networks, numbers, 0), want)
    assert family.options.guidance == 1.5, "the family itself draws as before"
    rare = family.measured(family.networks, numbers, 0, [1.0, 0.0])
    want = family.G(z, torch.zeros(4, dtype=torch.int64), torch.full((4,), 1.5)).clamp(-1, 1)
    torch.testing.assert_close(rare, want)


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"guidance": 4.5}, "from 1 to 4"), ({"steps": 4}, "steps means nothing")],
)
def test_sampling_can_change_what_was_learnt_alone(changes, words, tmp_path):
    family = built(tmp_path)
    assert adjustable(family) == {"guidance"}
    with pytest.raises(UserError, match=words):
        family.with_sampling(changes)


def test_a_progressive_generator_samples_in_one_way(tmp_path):
    assert adjustable(built(tmp_path, name="guided")) == frozenset()


def test_without_classes_it_is_noise_to_images(tmp_path):
    family = disturbed(built(tmp_path, *CLASSES))
    assert family.num_classes == 0 and not family.inputs.labels and not family.inputs.per_class
    numbers = torch.arange(3)
    images = family.sample(family.networks, numbers, 0)
    torch.testing.assert_close(images, family.G(family.latents(numbers, 0)).clamp(-1, 1))


def test_a_larger_stage_takes_over_all_weights(disc_data, tmp_path):
    small = tiny_config(NAME, disc_data, tmp_path)
    train(small)
    stages = [s.model_dump() for s in small.stages]
    grown = small.model_copy(
        update={"stages": (*small.stages, type(small.stages[0])(**stages[0] | {"resolution": 32}))}
    )
    family = Guided(grown, grown.stages[1], torch.device("cpu"))
    assert family.new_parameters("G") == set()
    saved = newest_checkpoint(tmp_path / "16x16" / "checkpoints").tensors("G")
    family.G.load_state_dict(saved)
    assert family.sample(family.networks, torch.arange(2), 0).shape == (2, 3, 32, 32)


def test_a_mix_has_no_batches_by_class(disc_data, tmp_path):
    mix = f"{{path: {disc_data}, weight: 1}}, {{path: {disc_data}, weight: 2}}"
    config = tiny_config(NAME, disc_data, tmp_path, f"data={{mix: [{mix}]}}")
    with pytest.raises(ConfigError, match="batches by class are read from one dataset"):
        train(config)


def test_guidance_and_class_of_samples_are_asked_for(disc_data, tmp_path):
    config = tiny_config(NAME, disc_data, tmp_path / "run")
    train(config)
    request = SampleRequest(config.run, 2, label=1, sampling={"guidance": 3.0})
    snapshot, grid = write_samples(request, tmp_path / "out")
    assert grid.is_file() and snapshot.family.options.guidance == 3.0
    with pytest.raises(UserError, match="--steps: family guided does not sample in steps"):
        write_samples(dataclasses.replace(request, sampling={"steps": 4}), tmp_path / "no")
    with pytest.raises(UserError, match=re.escape("from 1 to 4")):
        write_samples(dataclasses.replace(request, sampling={"guidance": 9.0}), tmp_path / "no")


def test_it_trains_compiled_as_without(disc_data, tmp_path, monkeypatch):
    monkeypatch.setattr(base, "COMPILER", "aot_eager")
    torch.compiler.reset()
    runs = tmp_path / "plain", tmp_path / "compiled"
    for run, compiled in zip(runs, ("false", "true"), strict=True):
        train(tiny_config(NAME, disc_data, run, f"engine.compile={compiled}"))
    plain, compiled = (
        newest_checkpoint(run / "16x16" / "checkpoints").tensors("G") for run in runs
    )
    torch.testing.assert_close(compiled, plain, rtol=1e-3, atol=1e-4)
