"""State dicts of guided-diffusion and improved-diffusion against a forward written for them.

The reference below follows the published code step by step, on the state dict alone, and shares
nothing with our U-Net.
"""

import math
import os
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from dinogen.config import parse_config
from dinogen.formats.guided_diffusion import read
from dinogen.formats.runs import FormatError, write_run
from dinogen.training.checkpointing.snapshot import load_snapshot
from dinogen.training.run import train
from dinogen.training.state import StageState
from tests.families.tiny import pack_discs
from tests.formats.unet_runs import inputs, unet_with

SIZE = 8
CASES = {
    "improved-diffusion": {"num_heads": 4},
    "its own learnt variance, and classes": {
        "num_heads": 2,
        "out": 6,
        "classes": 5,
        "scale": True,
        "blocks": 2,
    },
    "guided-diffusion": {"head_channels": 16, "scale": True, "by_block": True, "out": 6},
    "the new order of attention": {"head_channels": 8, "new": True, "attention": (1, 2)},
    "512x512's: half the channels at first": {
        "head_channels": 32,
        "model": 64,
        "mult": (0.5, 1, 1),
        "attention": (2, 4),
        "by_block": True,
        "scale": True,
    },
    "one level": {"head_channels": 32, "mult": (1,), "attention": (1,)},
    "more time steps": {"num_heads": 4, "num_steps": 4000},
}


class Made:
    """A random state dict, and the forward that the official code has for it."""

    def __init__(
        self,
        model=32,
        mult=(1, 2),
        blocks=1,
        attention=(2,),
        scale=False,
        by_block=False,
        out=3,
        classes=0,
        num_heads=None,
        head_channels=None,
        new=False,
        num_steps=1000,
    ):
        self.mult, self.blocks, self.attention = mult, blocks, attention
        self.scale, self.by_block, self.model = scale, by_block, model
        self.num_heads, self.head_channels, self.new = num_heads, head_channels, new
        self.time_scale = 1000 / num_steps
        self.generator = torch.Generator().manual_seed(0)
        self.state = {}
        self.linear("time_embed.0", model, 4 * model)
        self.linear("time_embed.2", 4 * model, 4 * model)
        if classes:
            self.state["label_emb.weight"] = self.draw(classes, 4 * model)
        channels = int(mult[0] * model)
        self.conv("input_blocks.0.0", 3, channels)
        skips, index = [channels], 0
        for level, m in enumerate(mult):
            for _ in range(blocks):
                index += 1
                width = int(m * model)
                self.block(f"input_blocks.{index}.0", channels, width)
                channels = width
                if 2**level in attention:
                    self.attend(f"input_blocks.{index}.1", channels)
                skips.append(channels)
            if level < len(mult) - 1:
                index += 1
                if by_block:
                    self.block(f"input_blocks.{index}.0", channels, channels)
                else:
                    self.conv(f"input_blocks.{index}.0.op", channels, channels)
                skips.append(channels)
        self.block("middle_block.0", channels, channels)
        self.attend("middle_block.1", channels)
        self.block("middle_block.2", channels, channels)
        index = -1
        for level, m in reversed(list(enumerate(mult))):
            for i in range(blocks + 1):
                index += 1
                self.block(f"output_blocks.{index}.0", channels + skips.pop(), int(m * model))
                channels, slot = int(m * model), 1
                if 2**level in attention:
                    self.attend(f"output_blocks.{index}.1", channels)
                    slot = 2
                if level and i == blocks:
                    if by_block:
                        self.block(f"output_blocks.{index}.{slot}", channels, channels)
                    else:
                        self.conv(f"output_blocks.{index}.{slot}.conv", channels, channels)
        self.norm("out.0", channels)
        self.conv("out.2", channels, out)

    def draw(self, *shape):
        return torch.randn(shape, generator=self.generator) / math.sqrt(math.prod(shape[1:]) or 1)

    def weights(self, name, weight):
        self.state[f"{name}.weight"] = weight
        self.state[f"{name}.bias"] = 0.1 * self.draw(len(weight), 1)[:, 0]

    def linear(self, name, inside, outside):
        self.weights(name, self.draw(outside, inside))

    def conv(self, name, inside, outside, side=3):
        self.weights(name, self.draw(outside, inside, side, side))

    def norm(self, name, channels):
        self.weights(name, 1 + 0.1 * self.draw(channels, 1)[:, 0])

    def block(self, name, inside, outside):
        self.norm(f"{name}.in_layers.0", inside)
        self.conv(f"{name}.in_layers.2", inside, outside)
        self.linear(f"{name}.emb_layers.1", 4 * self.model, (2 if self.scale else 1) * outside)
        self.norm(f"{name}.out_layers.0", outside)
        self.conv(f"{name}.out_layers.3", outside, outside)
        if inside != outside:
            self.conv(f"{name}.skip_connection", inside, outside, 1)

    def attend(self, name, channels):
        self.norm(f"{name}.norm", channels)
        self.weights(f"{name}.qkv", self.draw(3 * channels, channels, 1))
        self.weights(f"{name}.proj_out", self.draw(channels, channels, 1))

    # --- the forward

    def of(self, name):
        return self.state[f"{name}.weight"], self.state[f"{name}.bias"]

    def normed(self, name, x):
        return F.group_norm(x, 32, *self.of(name), eps=1e-5)

    def run_block(self, name, x, emb, resample=None):
        h = F.silu(self.normed(f"{name}.in_layers.0", x))
        if resample == "up":
            h, x = (F.interpolate(one, scale_factor=2, mode="nearest") for one in (h, x))
        if resample == "down":
            h, x = (F.avg_pool2d(one, 2, 2) for one in (h, x))
        h = F.conv2d(h, *self.of(f"{name}.in_layers.2"), padding=1)
        emb = F.linear(F.silu(emb), *self.of(f"{name}.emb_layers.1"))[..., None, None]
        if self.scale:
            scale, shift = emb.chunk(2, 1)
            h = self.normed(f"{name}.out_layers.0", h) * (1 + scale) + shift
        else:
            h = self.normed(f"{name}.out_layers.0", h + emb)
        h = F.conv2d(F.silu(h), *self.of(f"{name}.out_layers.3"), padding=1)
        if f"{name}.skip_connection.weight" in self.state:
            x = F.conv2d(x, *self.of(f"{name}.skip_connection"))
        return x + h

    def run_attention(self, name, x):
        b, c = x.shape[:2]
        flat = x.flatten(2)
        qkv = F.conv1d(self.normed(f"{name}.norm", flat), *self.of(f"{name}.qkv"))
        heads = self.num_heads or c // self.head_channels
        if self.new:
            q, k, v = (one.reshape(b * heads, c // heads, -1) for one in qkv.chunk(3, 1))
        else:
            q, k, v = qkv.reshape(b * heads, 3 * c // heads, -1).split(c // heads, 1)
        weight = torch.softmax(torch.einsum("bct,bcs->bts", q, k) / math.sqrt(c // heads), -1)
        out = torch.einsum("bts,bcs->bct", weight, v).reshape(b, c, -1)
        return (flat + F.conv1d(out, *self.of(f"{name}.proj_out"))).reshape(x.shape)

    def run(self, x, t, label=None):
        half = self.model // 2
        frequencies = torch.exp(-math.log(10000) * torch.arange(half) / half)
        angles = (t.float() * self.time_scale)[:, None] * frequencies
        emb = torch.cat([angles.cos(), angles.sin()], 1)
        emb = F.linear(emb, *self.of("time_embed.0"))
        emb = F.linear(F.silu(emb), *self.of("time_embed.2"))
        if label is not None:
            emb = emb + self.state["label_emb.weight"][label]
        x = F.conv2d(x, *self.of("input_blocks.0.0"), padding=1)
        skips, index = [x], 0
        for level in range(len(self.mult)):
            for _ in range(self.blocks):
                index += 1
                x = self.run_block(f"input_blocks.{index}.0", x, emb)
                if 2**level in self.attention:
                    x = self.run_attention(f"input_blocks.{index}.1", x)
                skips.append(x)
            if level < len(self.mult) - 1:
                index += 1
                if self.by_block:
                    x = self.run_block(f"input_blocks.{index}.0", x, emb, "down")
                else:
                    x = F.conv2d(x, *self.of(f"input_blocks.{index}.0.op"), stride=2, padding=1)
                skips.append(x)
        x = self.run_block("middle_block.0", x, emb)
        x = self.run_attention("middle_block.1", x)
        x = self.run_block("middle_block.2", x, emb)
        index = -1
        for level in reversed(range(len(self.mult))):
            for i in range(self.blocks + 1):
                index += 1
                x = self.run_block(f"output_blocks.{index}.0", torch.cat([x, skips.pop()], 1), emb)
                slot = 1
                if 2**level in self.attention:
                    x = self.run_attention(f"output_blocks.{index}.1", x)
                    slot = 2
                if level and i == self.blocks:
                    name = f"output_blocks.{index}.{slot}"
                    if self.by_block:
                        x = self.run_block(name, x, emb, "up")
                    else:
                        x = F.interpolate(x, scale_factor=2, mode="nearest")
                        x = F.conv2d(x, *self.of(f"{name}.conv"), padding=1)
        return F.conv2d(F.silu(self.normed("out.0", x)), *self.of("out.2"), padding=1)


def saved(tmp_path, state):
    torch.save(state, tmp_path / "ema.pt")
    return tmp_path / "ema.pt"


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_what_is_read_computes_what_the_official_code_does(name, tmp_path):
    case = CASES[name]
    made = Made(**case)
    weights = read(
        saved(tmp_path, made.state),
        SIZE,
        num_heads=case.get("num_heads"),
        head_channels=case.get("head_channels"),
        new_attention_order=case.get("new", False),
        num_steps=case.get("num_steps", 1000),
        rescale_timesteps="num_steps" in case or None,
    )
    x, t = inputs()
    t = t * (case.get("num_steps", 1000) // 100)
    label = torch.tensor([0, 4, 2]) if "classes" in case else None
    theirs = made.run(x, t, label)[:, :3]
    assert theirs.std() > 0.1
    torch.testing.assert_close(unet_with(weights)(x, t, label), theirs, rtol=0, atol=2e-5)
    assert any("DROPPED" in note for note in weights.notes) == (case.get("out") == 6)
    assert weights.facts == {"learnt_variance": case.get("out") == 6}


def test_shapes_tell_the_network(tmp_path):
    found = read(saved(tmp_path, Made(**CASES["guided-diffusion"]).state), SIZE, head_channels=16)
    assert dict(found.family) == {
        "name": "ddpm",
        "schedule": "linear",
        "prediction": "epsilon",
        "num_steps": 1000,
        "sample_steps": 100,
        "base_channels": 32,
        "channel_multipliers": [1, 2],
        "num_blocks": 1,
        "attention_resolutions": [4],
        "num_classes": 0,
        "head_channels": 16,
        "unet": {"norm_groups": 32, "num_heads": None, "scale": True, "resampling": "block"},
    }


def test_no_class_is_the_mean_of_all(tmp_path):
    made = Made(num_heads=1, classes=4)
    rows = read(saved(tmp_path, made.state), SIZE, num_heads=1).networks["G"]["label.weight"]
    assert torch.equal(rows[:4], made.state["label_emb.weight"])
    assert torch.equal(rows[4], made.state["label_emb.weight"].mean(0))


def test_a_new_run_begins_where_the_weights_stood(tmp_path):
    file = saved(tmp_path, Made(num_heads=2).state)
    weights = read(file, 16, num_heads=2)
    write_run(tmp_path / "read", weights)
    first = load_snapshot(tmp_path / "read")
    assert first.nimg == 0
    state = first.checkpoint.tensors("G"), first.checkpoint.tensors("G.ema")
    assert all(torch.equal(one[name], weights.networks["G"][name]) for one in state for name in one)

    pack_discs(tmp_path / "data")
    config = parse_config(
        {
            "run": str(tmp_path / "new"),
            "init_from": str(tmp_path / "read"),
            "data": {"path": str(tmp_path / "data"), "num_threads": 0},
            "family": dict(weights.family) | {"sample_steps": 2},
            "stages": [{"resolution": 16, "kimg": 0.008, "batch": 4}],
            "log": {"num_samples": 2},
        }
    )
    new = StageState(config, 0)
    wanted = first.family.with_sampling({"steps": 2})
    indices = torch.arange(2)
    for networks in (new.family.networks, new.ema.networks):
        images = new.family.sample(networks, indices, config.seed)
        assert torch.equal(images, wanted.sample(first.ema.networks, indices, config.seed))
    assert new.progress.nimg == 0
    train(config)
    learnt = load_snapshot(tmp_path / "new")
    assert learnt.nimg == 8 and torch.isfinite(learnt.sample(1, 0)).all()
    changed = learnt.checkpoint.tensors("G")
    assert not any(torch.equal(changed[name], weights.networks["G"][name]) for name in changed)


class Runs:
    """What a pickle can hide."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_file_that_would_run_code_is_not_run(tmp_path):
    file = saved(tmp_path, {"out.2.weight": Runs(tmp_path / "ran")})
    with pytest.raises(FormatError, match=r"holds posix\.mkdir .* not read, for that may run code"):
        read(file, SIZE, num_heads=4)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_a_file_that_is_cut_off(share, tmp_path):
    file = saved(tmp_path, Made(num_heads=4).state)
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(FormatError, match=r"ema\.pt: .*cut off"):
        read(file, SIZE, num_heads=4)


def without(state, *parts):
    return {name: one for name, one in state.items() if not any(part in name for part in parts)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: {"model": s}, "model is no tensor"),
        (lambda s: {"conv1.weight": torch.zeros(3)}, "no U-Net of guided-diffusion"),
        (lambda s: without(s, "output_blocks", "out.2"), "is a classifier"),
        (lambda s: without(s, ".conv.", ".op."), r"conv_resample=False"),
        (
            lambda s: s | {"input_blocks.0.0.weight": torch.zeros(32, 6, 3, 3)},
            "is an upsampler",
        ),
        (lambda s: without(s, "middle_block.2.in_layers.0.bias"), "in_layers.0.bias is missing"),
        (lambda s: s | {"low_res.weight": torch.zeros(3)}, "low_res.weight is not known"),
        (lambda s: s | {"time_embed.0.weight": torch.zeros(132, 33)}, "33 time channels"),
    ],
)
def test_other_files_are_named(change, message, tmp_path):
    file = saved(tmp_path, change(Made(num_heads=4).state))
    with pytest.raises(FormatError, match=message):
        read(file, SIZE, num_heads=4)


def test_a_tensor_of_another_shape_is_named_before_anything_is_written(tmp_path):
    state = Made(num_heads=4).state | {"middle_block.0.in_layers.0.bias": torch.zeros(3)}
    weights = read(saved(tmp_path, state), SIZE, num_heads=4)
    with pytest.raises(FormatError, match=r"middle\.0\.norm0\.bias is \(3,\), not \(64,\)"):
        write_run(tmp_path / "run", weights)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "--num-heads .* or --head-channels"),
        ({"num_heads": 4, "head_channels": 64}, "--num-heads .* or --head-channels"),
        ({"num_heads": 4, "num_steps": 4000}, "--rescale-timesteps"),
        ({"num_heads": 5}, "num_heads 5 do not divide 64"),
        ({"head_channels": 48}, "head_channels 48 do not divide 64"),
    ],
)
def test_options_that_are_missing_or_do_not_fit(options, message, tmp_path):
    with pytest.raises(FormatError, match=message):
        read(saved(tmp_path, Made(num_heads=4).state), SIZE, **options)


def test_a_file_that_is_not_there():
    with pytest.raises(FormatError, match="there is no such file"):
        read(Path("nowhere.pt"), SIZE, num_heads=4)
