"""Alignment of hidden tokens with stored features, in the families that have it."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from dinogen.config import ConfigError, parse_config
from dinogen.features import GuideInfo
from dinogen.guidance import alignment as module
from dinogen.training.checkpointing.export import export
from dinogen.training.checkpointing.snapshot import load_snapshot
from dinogen.training.data import makes_pyramids
from dinogen.training.run import train
from dinogen.training.state import StageState
from dinogen.training.trainer import Trainer
from shards.read.dataset import open_dataset
from tests.families.tiny import BATCH, TINY, discs, pack_discs, tiny_config

REPA = ("ddpm-repa", "flow-repa")
BLOCKS = [16, 8, 8, 8, 8, 8, 16, 16]  # sides after the blocks of the tiny U-Net
INFO = GuideInfo("dinov2", "here", None, "0" * 64, 32, [1], True).to_dict()


def pack_levels(folder, flips=True, **changes):
    """Discs whose features are their number, and its negative for their mirror images."""
    levels = []
    for number in range(24):
        own = np.full((256, 32), number + 1.0)
        levels.append({"n16": own, "n4": own[:16], "p8": own[:64, :5]})
        if flips:
            levels[-1] |= {"flipped.n16": -own, "flipped.n4": -own[:16]}
    guides = {"flipped": INFO} if flips else {}
    pack_discs(folder, levels, guide=INFO, guides=guides, **changes)
    return folder


def first_batch(state: StageState):
    inputs = state.family.inputs
    return state.data.read(range(BATCH), image_size=inputs.image_size, levels=inputs.levels)


@pytest.mark.parametrize("family", REPA)
def test_the_loss_is_that_of_the_prediction_less_the_weighed_cosine(family, disc_data, tmp_path):
    plain_options = {name: value for name, value in TINY[family].items() if name != "repa"}
    config = tiny_config(family, disc_data, tmp_path)
    data = config.model_dump(mode="json")
    data["family"] = {"name": config.family.name, **plain_options}
    with_repa, plain = StageState(config, 0), StageState(parse_config(data), 0)
    batch = first_batch(with_repa)
    (phase,), (without,) = with_repa.family.phases, plain.family.phases
    seen = []
    hook = with_repa.family.G.projector.register_forward_hook(lambda *args: seen.append(args[2]))
    losses, report = phase.losses(batch)
    hook.remove()
    level = TINY[family]["repa"]["level"]
    features = batch["pyramid"][int(level[1:])].double()
    (tokens,) = (one.double() for one in seen)
    assert tokens.shape == features.shape
    cosine = (tokens * features).sum(-1) / tokens.norm(dim=-1) / features.norm(dim=-1)
    assert float(report["cos"]) == pytest.approx(cosine.mean().item(), abs=1e-6)
    assert losses["repa"].item() == pytest.approx(-0.5 * cosine.mean().item(), abs=1e-6)
    # built last, the projector takes no random numbers from the rest
    name = with_repa.family.options.prediction
    assert torch.equal(losses[name], without.losses(batch)[0][name])


def test_it_ends_where_it_is_told_to(disc_data, tmp_path):
    """At the step that begins at 16 images, of which its last position is 23."""
    state = StageState(tiny_config("flow-repa", disc_data, tmp_path), 0)
    (phase,), G = state.family.phases, state.family.G
    batch = first_batch(state)

    def gradients(first, *wanted):
        batch["position"] = torch.arange(first, first + BATCH)
        losses, report = phase.losses(batch)
        assert float(report["cos"]) != 0
        torch.stack([losses[name] for name in wanted]).sum().backward()
        found = {name: p.grad for name, p in G.named_parameters() if p.grad is not None}
        G.zero_grad()
        return found

    before, after = gradients(8, "v", "repa"), gradients(16, "v", "repa")
    assert before["projector.fc0.weight"].any()
    assert not after["projector.fc0.weight"].any()
    # every parameter keeps a gradient, which engines of many ranks wait for
    assert set(after) == {name for name, _ in G.named_parameters()}
    alone = gradients(16, "v")
    assert all(torch.equal(after[name], value) for name, value in alone.items())
    state.family.start = 5  # after a stage that ended there: steps begin at 5, 13, 21
    assert gradients(13, "repa")["projector.fc0.weight"].any()
    assert not gradients(21, "repa")["projector.fc0.weight"].any()


@pytest.mark.parametrize("family", REPA)
def test_mirrored_images_are_compared_with_the_features_of_mirror_images(
    family, tmp_path, monkeypatch
):
    data = pack_levels(tmp_path / "data")
    stored = {f"disc{n:03d}": (n + 1, pixels) for n, pixels in enumerate(discs(24))}
    seen = []
    original, update = module.alignment, Trainer._update
    monkeypatch.setattr(
        module, "alignment", lambda t, f: (seen.append(f[:, 0, 0].tolist()), original(t, f))[1]
    )
    shown = []

    def looked_at(self, phase, micros):
        for micro, _ in micros:
            shown.append((micro["key"], micro["image"]))
        return update(self, phase, micros)

    monkeypatch.setattr(Trainer, "_update", looked_at)
    train(tiny_config(family, data, tmp_path / "run", "augment.flip=0.5", "engine.micro_batch=4"))
    found = [value for values in seen for value in values]
    keys = [key for batch, _ in shown for key in batch]
    images = [image for _, batch in shown for image in batch]
    assert len(found) == len(keys) == len(images) == 32
    signs = set()
    for key, image, feature in zip(keys, images, found, strict=True):
        number, pixels = stored[key]
        own = torch.from_numpy(pixels.copy()).permute(2, 0, 1) / 127.5 - 1
        if torch.equal(own, own.flip(2)):
            continue  # a disc in the middle
        mirrored = torch.allclose(image, own.flip(2), atol=1e-6)
        assert mirrored or torch.allclose(image, own, atol=1e-6)
        assert feature == (-number if mirrored else number)
        signs.add(mirrored)
    assert signs == {True, False}


def test_flips_need_features_of_both_orientations(tmp_path):
    data = pack_levels(tmp_path / "data", flips=False)
    config = tiny_config("flow-repa", data, tmp_path / "run", "augment.flip=0.5")
    said = r"stage 16 reads the level flipped\.n16.*prepare\.pyramids\.flips=true.*augment\.flip=0"
    with pytest.raises(ConfigError, match=said):
        train(config)
    # nor are they forgotten when the data are prepared for this config
    with pytest.raises(ConfigError, match=r"prepare\.pyramids\.flips: .*flipped\.n16"):
        makes_pyramids(config)
    flips = ["augment.flip=0.5", "prepare.pyramids.flips=true"]
    assert makes_pyramids(tiny_config("flow-repa", data, tmp_path / "run", *flips))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["layer=2"], r"family\.repa\.layer: after block 2 there are 8x8 tokens, but level n16 "
         r"holds 16x16 features: use block 1, 7 or 8, or a level of another grid, as n8"),
        (["level=n4"], r"block 1 there are 16x16 .* n4 holds 4x4 features: use a level of another"),
        (["layer=9"], r"family\.repa\.layer 9: there are layers 1 to 8 \(grids of side 16, 8\)"),
        (["layer=0"], r"family: repa\.layer"),
        (["level=clip"], r"family: repa\.level: clip is one vector of an image"),
        (["level=latents.n4"], r"family: repa\.level: latents\.n4 holds latents of an autoenc"),
        (["level=sixteen"], r"family: repa\.level: 'sixteen' is not the name of a level"),
        (["level=p16"], r"stage 16 reads the level p16, the shards have .*n16"),
        (["level=wide.n16"], r"stage 16 reads the level wide\.n16"),
        (["channels=33"], r"family\.repa\.channels: 33, but level n16 of .* has 32: set it to 32"),
        (["layer=3", "level=p8"], r"family\.repa\.channels: 32, but level p8 .* has 5: set it to"),
        (["weight=0"], r"family: repa\.weight"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_said_with_what_does(tmp_path, changes, message):
    data = pack_levels(tmp_path / "data")
    options = [f"family.repa.{one}" for one in changes]
    with pytest.raises(ConfigError, match=message):
        train(tiny_config("flow-repa", data, tmp_path / "run", *options))


def test_the_sides_of_the_tiny_network(disc_data, tmp_path):
    state = StageState(tiny_config("flow-repa", disc_data, tmp_path), 0)
    assert list(state.family.G.grids) == BLOCKS


def test_a_run_loads_no_guide_and_says_which_one_it_was(disc_data, tmp_path, monkeypatch):
    monkeypatch.setattr("dinogen.features.load.load_guide", lambda *_: pytest.fail("loaded"))
    config = tiny_config(
        "flow-repa", disc_data, tmp_path / "run", "eval.every_kimg=0.016", "guide.path=nowhere"
    )
    (result,) = train(config)
    made_by = open_dataset(disc_data).manifest.guide
    assert result["guide"] == made_by and result["random_guide"] is True
    lines = [json.loads(x) for x in (config.run / "16x16/stats.jsonl").read_text().splitlines()]
    curves = [line for line in lines if "G/repa" in line]
    assert len(curves) == 4 and all(-1 <= line["G/cos"] <= 1 for line in curves)
    weights = [-line["G/repa"] / line["G/cos"] for line in curves]
    assert weights == pytest.approx([0.5, 0.5, 0, 0], abs=1e-4)
    held_out = [line["val/repa"] for line in lines if "val/repa" in line]
    assert len(held_out) == 2 and all(-1 <= value <= 1 for value in held_out)


@pytest.mark.parametrize("family", REPA)
def test_an_exported_file_samples_without_data(family, disc_data, tmp_path):
    config = tiny_config(family, disc_data, tmp_path / "run", "stages.0.kimg=0.008")
    train(config)
    snapshot = load_snapshot(config.run)
    path = tmp_path / "file.safetensors"
    export(config.run, path)
    expected = snapshot.sample(2, seed=0)
    assert torch.equal(load_snapshot(path).sample(2, seed=0), expected)


@pytest.mark.parametrize(
    ("made_by", "label"),
    [(INFO | {"factor": 8}, "RANDOM guide (dinov2)"), ({"name": "theirs", "random": True}, None)],
)
@pytest.mark.parametrize("kind", ["repa", "representation"])
def test_the_identity_of_a_guide_may_have_more_facts_or_fewer(made_by, label, kind, tmp_path):
    levels = [{"n4": np.full((16, 32), number + 1.0)} for number in range(24)]
    pack_discs(tmp_path / "data", levels, guide=made_by)
    own = {
        "repa": "family.repa={layer: 1, level: n4, channels: 32, hidden: 8}",
        "representation": "family.representation={level: n4, channels: 32, width: 8, depth: 1}",
    }
    config = tiny_config("flow-dit", tmp_path / "data", tmp_path / "run", own[kind])
    facts = StageState(config, 0).family.describe()
    assert facts["guide"] == made_by and facts["random_guide"] is True
    assert facts.get("guide_label") == label


def test_data_that_name_no_guide_will_do(tmp_path, caplog):
    levels = [{"n16": np.full((256, 32), number + 1.0)} for number in range(24)]
    pack_discs(tmp_path / "data", levels)
    changes = ["stages.0.kimg=0.008", "augment.rotate=5"]
    config = tiny_config("flow-repa", tmp_path / "data", tmp_path / "run", *changes)
    (result,) = train(config)
    assert "does not say which guide made level n16" in caplog.text
    assert "augment.rotate: 5 turns images, but not the features" in caplog.text
    assert "guide_label" not in result or result["guide_label"] is None


def test_it_learns_to_align(tmp_path):
    """Features that the image tells, the colours at each place, are soon predicted."""
    levels = []
    for pixels in discs(24):
        own = pixels.reshape(256, 3) / 127.5 - 1
        levels.append({"n16": np.concatenate([own, own**2, np.ones((256, 26))], 1)})
    pack_discs(tmp_path / "data", levels, guide=INFO)
    changes = ["stages.0.kimg=0.4", "stages.0.lr=0.003", "family.repa.until_kimg=null"]
    config = tiny_config("flow-repa", tmp_path / "data", tmp_path / "run", *changes)
    train(config)
    lines = [json.loads(x) for x in (config.run / "16x16/stats.jsonl").read_text().splitlines()]
    cosines = [line["G/cos"] for line in lines if "G/cos" in line]
    assert cosines[0] < 0.3 and cosines[-1] > 0.9
