"""Images conditioned on CLIP's embeddings: trained, resumed, on ranks, sampled by prompts."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from dinogen.config import ConfigError, GuideConfig
from dinogen.config.training import ClipConfig
from dinogen.evaluation.evaluate import evaluate
from dinogen.features.clip import load_clip
from dinogen.features.load import load_guide
from dinogen.features.pyramid import native_pyramid
from dinogen.report.images import to_uint8
from dinogen.training.checkpointing.checkpoint import newest_checkpoint
from dinogen.training.checkpointing.snapshot import load_snapshot
from dinogen.training.run import train
from dinogen.training.state import StageState
from launch.cli.main import app
from shards.format.sample import Sample
from shards.write.shard_writer import pack
from tests import drawn
from tests.families.tiny import tiny_config
from tests.tiny_clip import EMBED_DIM, random_clip
from tests.training.on_ranks import on_ranks

TEXT = {"embed_dim": EMBED_DIM, "dropout": 0.3, "noise": 0.2}
TEXTS = {"images": TEXT, "captions": {**TEXT, "condition": "captions", "joint_weight": 0}}


@pytest.fixture(scope="module")
def drawn_data(tmp_path_factory) -> Path:
    """24 drawn faces of 16x16 with pixels, embeddings and, but for one, captions."""
    folder = tmp_path_factory.mktemp("drawn")
    clip = load_clip(ClipConfig(path=str(random_clip(folder / "clip"))), torch.device("cpu"))
    guide = load_guide(GuideConfig(name="pixels"), torch.device("cpu"))
    rows = drawn.some_attributes(24, 0)
    faces = drawn.draw(rows, 1, size=16)
    tensors = drawn.as_tensor(faces)
    captions = [drawn.caption(row) for row in rows]
    captions[5] = None
    with torch.no_grad():
        features = native_pyramid(guide, tensors, (16,))[16].half().numpy()
        images = clip.images(tensors).half().numpy()
        texts = [clip.captions([text])[0] if text else torch.zeros(EMBED_DIM) for text in captions]
    samples = []
    for number, pixels in enumerate(faces):
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        levels = {
            "n16": features[number],
            "more.n16": features[number],
            "clip": images[number][None],
            "text": texts[number].half().numpy()[None],
        }
        samples.append(
            Sample(
                f"face{number:03d}",
                file.getvalue(),
                "png",
                {},
                levels,
                caption=captions[number],
            )
        )
    pack(
        samples,
        folder / "data",
        shard_size=8,
        val_fraction=0.25,
        guide=guide.info.to_dict(),
        guides={"more": guide.info.to_dict()},
        clip=clip.info,
    )
    return folder / "data"


def text_config(data, run, condition, *overrides):
    given = [
        "guide={name: pixels}",
        f"clip.path={data.parent / 'clip'}",
        f"family.text={json.dumps(TEXTS[condition])}",
        "family.objectives=[{name: energy, views: [global]}]",
        "family.reference_batch=6",
    ]
    return tiny_config("guided", data, run / condition, *given, *overrides)


def train_both(data, out, ways):
    for way, overrides in ways.items():
        for condition in TEXTS:
            train(text_config(data, out / way, condition, *overrides))


def weights(folder):
    found = newest_checkpoint(folder / "16x16" / "checkpoints")
    assert found is not None
    return found.tensors("G")


@pytest.fixture(scope="module")
def whole(drawn_data, tmp_path_factory):
    out = tmp_path_factory.mktemp("text")
    train_both(drawn_data, out, {"whole": []})
    return out / "whole"


@pytest.mark.parametrize("condition", list(TEXTS))
def test_it_goes_on_bitwise(condition, whole, drawn_data, tmp_path):
    train(text_config(drawn_data, tmp_path, condition, "stages.0.kimg=0.016"))
    train(text_config(drawn_data, tmp_path, condition))
    want, found = weights(whole / condition), weights(tmp_path / condition)
    assert [k for k, v in want.items() if not torch.equal(v, found[k])] == []


def test_ranks_and_parts_train_as_one(whole, drawn_data, tmp_path):
    ways = {"ddp": ["engine.micro_batch=2"], "deepspeed": ["engine.name=deepspeed"]}
    on_ranks(2, train_both, drawn_data, tmp_path, ways)
    for way in ways:
        for condition in TEXTS:
            want, found = weights(whole / condition), weights(tmp_path / way / condition)
            for key, value in want.items():
                torch.testing.assert_close(
                    found[key], value, rtol=2e-3, atol=5e-5, msg=f"{way} {condition} {key}"
                )


def test_each_prompt_has_images_of_its_own(whole):
    snapshot = load_snapshot(whole / "images")
    nothing = snapshot.sample(4, 0)
    both = snapshot.sample(4, 0, snapshot.condition(["a face, red hair", "a face, glasses"], 2.0))
    one = snapshot.sample(4, 0, snapshot.condition(["a face, red hair"], 2.0))
    torch.testing.assert_close(both[[0, 2]], one[[0, 2]])
    assert (both[[1, 3]] - one[[1, 3]]).abs().amax((1, 2, 3)).min() > 1e-4
    none = snapshot.sample(4, 0, snapshot.condition(["a face, red hair"], 0.0))
    torch.testing.assert_close(none, nothing)
    assert torch.equal(snapshot.sample(4, 0), nothing), "no condition stays behind"


def test_samples_without_a_caption_are_unconditional(drawn_data, tmp_path):
    state = StageState(text_config(drawn_data, tmp_path, "captions", "family.text.dropout=0"), 0)
    batch = state.data.read(range(18), levels=state.family.inputs.levels)
    conditioning = state.family.training.text.conditioning(batch, "ask")
    there = [bool(state.data.sample(number).caption) for number in range(18)]
    assert conditioning.keep.tolist() == there
    assert sum(there) >= 17


PAIRS_AND_SETS = {
    "taught by energy": ([{"name": "mse"}, {"name": "energy"}], True),
    "by nobody else": ([{"name": "mse"}], False),
    "not what is compared": (
        [{"name": "mse", "guides": ["main"]}, {"name": "energy", "guides": ["more"]}],
        False,
    ),
    "z says who it is": ([{"name": "paired"}, {"name": "energy"}], False),
}


@pytest.mark.parametrize("case", list(PAIRS_AND_SETS))
def test_unconditional_samples_are_not_pulled_to_the_mean_if_another_objective_has_them(
    case, drawn_data, tmp_path
):
    terms, left_out = PAIRS_AND_SETS[case]
    config = text_config(
        drawn_data,
        tmp_path,
        "images",
        "family.text.dropout=0.5",
        f"family.objectives={json.dumps(terms)}",
        f"family.reference_batch={6 if len(terms) > 1 else 0}",
        f"guides={'{more: {name: pixels}}' if 'more' in str(terms) else '{}'}",
    )
    state = StageState(config, 0)
    family, data = state.family, state.data
    levels = family.inputs.levels

    def losses_with_other(rows):
        batch = data.read(range(18), levels=levels)
        batch["reference_batch"] = data.read(range(6), levels=levels)
        batch["pyramid"][16][rows] += 1
        trained = family.phases[-1].losses(batch)[0][terms[0]["name"]]
        return trained.item(), family.held_out({"G": family.G}, batch)[terms[0]["name"]].item()

    batch = data.read(range(18), levels=levels)
    keep = family.training.text.conditioning(batch, "ask").keep.numpy()
    assert 3 < keep.sum() < 15
    whole, other = losses_with_other([]), losses_with_other(~keep)
    assert (other[0] == whole[0]) == left_out
    # All held-out images are conditional, so dropout does not change how a run is measured.
    assert other[1] != whole[1]
    assert losses_with_other(keep)[0] != whole[0]
    assert family.training.text.conditioning(batch, "ask/held-out", drop=False).keep.all()


def test_the_command_samples_by_prompts(whole, tmp_path):
    run = whole / "images"
    words = ["sample", str(run), "--num", "2", "--text", "a face, red hair", "--guidance", "2"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    (folder,) = (run / "samples").glob("*red-hair*_g2")
    assert (folder / "prompts.txt").read_text() == "a face, red hair\n"
    assert len(list(folder.glob("0000*.png"))) == 2


def test_prompts_are_measured_and_change_no_other_value(whole, drawn_data, tmp_path):
    """Against the images of the command line, embedded and compared by hand."""
    run = whole / "captions"
    prompts = ["a face, red hair", "a face, glasses", "a face, smiling"]
    (tmp_path / "prompts.txt").write_text("\n".join([*prompts, "", prompts[0]]))
    changes = [
        f"metrics.clip={drawn_data.parent / 'clip'}",
        f"metrics.prompts={tmp_path / 'prompts.txt'}",
        "metrics.guidance=1.5",
        f"metrics.cache={tmp_path / 'cache'}",
    ]
    names = ["clip_score", "clip_retrieval", "fd_onet"]
    measured = evaluate(run, num_samples=7, names=names, changes=changes)["measured"]
    snapshot = load_snapshot(run)
    drawn_for = snapshot.condition(prompts, 1.5)
    images = torch.from_numpy(to_uint8(snapshot.sample(7, 0, drawn_for).numpy())).permute(
        0, 3, 1, 2
    )
    clip = load_clip(ClipConfig(path=str(drawn_data.parent / "clip")), torch.device("cpu"))
    cosines = clip.images(images.float() / 127.5 - 1) @ clip.captions(prompts).T
    own = torch.arange(7) % 3
    score = 2.5 * cosines[torch.arange(7), own].clamp(min=0).mean()
    assert measured["clip_score"]["value"] == pytest.approx(float(score), abs=1e-3)
    right = (cosines.argmax(1) == own).float().mean()
    assert measured["clip_retrieval"]["value"] == pytest.approx(float(right), abs=1e-6)
    alone = evaluate(run, num_samples=7, names=["fd_onet"], changes=changes[3:])["measured"]
    assert alone["fd_onet"]["value"] == pytest.approx(measured["fd_onet"]["value"], rel=1e-6)
    other = whole / "images"
    missing = evaluate(other, num_samples=7, names=["clip_score"], changes=changes[:1])["measured"]
    assert "metrics.prompts" in missing["clip_score"]["reason"]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["clip=null"], "clip: family.text needs it"),
        (["family.text.embed_dim=7"], "family.text.embed_dim: 7"),
    ],
)
def test_mistakes_are_named(overrides, words, drawn_data, tmp_path):
    with pytest.raises(ConfigError, match=words):
        StageState(text_config(drawn_data, tmp_path, "images", *overrides), 0)


def test_another_clip_is_refused(whole, drawn_data, tmp_path):
    other = random_clip(tmp_path / "clip", seed=1)
    config = text_config(drawn_data, tmp_path, "images", f"clip.path={other}")
    with pytest.raises(ConfigError, match="is not the one that embedded"):
        StageState(config, 0)


def test_runs_without_text_take_no_prompts(drawn_data, tmp_path):
    config = text_config(drawn_data, tmp_path, "images", "family.text=null", "clip=null")
    train(config)
    result = CliRunner().invoke(app, ["sample", str(config.run), "--text", "a face"])
    assert result.exit_code != 0
    assert "was not trained with text" in str(result.exception) + result.output


def test_guidance_needs_words(whole):
    result = CliRunner().invoke(app, ["sample", str(whole / "images"), "--guidance", "2"])
    assert result.exit_code != 0
    assert "--guidance exaggerates what --text asks for" in str(result.exception) + result.output
