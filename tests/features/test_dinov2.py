"""The DINOv2 guide against transformers' own outputs, in eager attention."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dinogen.config import GuideConfig
from dinogen.features import Guide, GuideError, dinov2, load_guide
from dinogen.features.dinov2 import make_random_dinov2

CPU = torch.device("cpu")
PATCH, NUM_LAYERS, HIDDEN = 14, 3, 32  # of the fixture `checkpoint`


def guide_of(folder, **changes):
    return load_guide(GuideConfig(path=str(folder), **changes), CPU)


def eager_map(folder, images, layer=NUM_LAYERS):
    """(B, C, g, g) by transformers alone: eager attention, one place after the other."""
    import transformers

    model = transformers.AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    std = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    output = model((images / 2 + 0.5 - mean) / std, output_hidden_states=True)
    if layer == NUM_LAYERS:
        hidden = output.last_hidden_state
    else:
        hidden = model.layernorm(output.hidden_states[layer])
    grid = images.shape[-1] // PATCH
    first = 1 + getattr(model.config, "num_register_tokens", 0)
    assert hidden.shape[1] == first + grid * grid
    rows = [
        torch.stack([hidden[:, first + row * grid + column] for column in range(grid)], -1)
        for row in range(grid)
    ]
    return torch.stack(rows, -2)


def random_images(size, num=2):
    return torch.rand(num, 3, size, size, generator=torch.Generator().manual_seed(size)) * 2 - 1


@pytest.mark.parametrize("grid", [4, 5, 16])
def test_features_and_pixel_gradients_are_those_of_eager_transformers(checkpoint, grid):
    guide = guide_of(checkpoint)
    assert isinstance(guide, Guide)
    assert guide.model.config._attn_implementation == "sdpa"
    assert guide.input_size(grid) == grid * PATCH

    images = random_images(grid * PATCH).requires_grad_()
    features = guide(images)
    probe = torch.randn(features.shape, generator=torch.Generator().manual_seed(1))
    (gradient,) = torch.autograd.grad((features * probe).sum(), images)

    expected = eager_map(checkpoint, images)
    (expected_gradient,) = torch.autograd.grad((expected * probe).sum(), images)
    assert features.shape == (2, HIDDEN, grid, grid) and features.dtype == torch.float32
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)
    scale = expected_gradient.abs().max()
    assert scale > 1e-3
    torch.testing.assert_close(gradient / scale, expected_gradient / scale, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("layer", "resolved"), [(1, 1), (2, 2), (-1, 3), (-2, 2), (3, 3)])
def test_layer_is_the_hidden_state_behind_that_block_normed(checkpoint, layer, resolved):
    guide = guide_of(checkpoint, layer=layer)
    images = random_images(4 * PATCH)
    expected = eager_map(checkpoint, images, resolved)
    torch.testing.assert_close(guide(images), expected, rtol=1e-4, atol=1e-5)
    assert guide.info.layer == resolved
    assert guide.info.weights_sha256 == guide_of(checkpoint).info.weights_sha256


@pytest.mark.parametrize("layer", [0, 4, -4])
def test_a_layer_that_is_not_there_is_refused(checkpoint, layer):
    with pytest.raises(GuideError, match=r"guide\.layer: .*3 blocks"):
        guide_of(checkpoint, layer=layer)


def test_frozen_and_in_eval_mode_regardless_of_the_parent(make_checkpoint, tmp_path):
    make_checkpoint(tmp_path / "c", 0, hidden_dropout_prob=0.5, drop_path_rate=0.5)
    guide = guide_of(tmp_path / "c")
    parent = torch.nn.ModuleList([guide]).train()
    images = random_images(4 * PATCH)
    assert torch.equal(guide(images), guide(images))
    assert parent.training and not any(module.training for module in guide.modules())
    assert not any(parameter.requires_grad for parameter in guide.parameters())


def test_an_outer_autocast_does_not_reach_in(checkpoint):
    guide = guide_of(checkpoint)
    images = random_images(4 * PATCH)
    plain = guide(images)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(guide(images), plain)


@pytest.mark.parametrize("shape", [(57, 57), (56, 70)])
def test_images_of_another_shape_are_refused(checkpoint, shape):
    with pytest.raises(ValueError, match=f"multiple of 14 pixels, not {shape[0]}x{shape[1]}"):
        guide_of(checkpoint)(torch.zeros(1, 3, *shape))


def test_a_half_precision_checkpoint_runs_in_float32(checkpoint, tmp_path):
    config = json.loads((checkpoint / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "dtype": "float16"}))
    stored = {k: v.half() for k, v in load_file(checkpoint / "model.safetensors").items()}
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    guide = guide_of(tmp_path)
    assert {parameter.dtype for parameter in guide.parameters()} == {torch.float32}
    assert guide.info.weights_sha256 != guide_of(checkpoint).info.weights_sha256


def test_a_checkpoint_that_lacks_weights_is_refused_not_filled_with_noise(checkpoint, tmp_path):
    (tmp_path / "config.json").write_text((checkpoint / "config.json").read_text())
    stored = load_file(checkpoint / "model.safetensors")
    del stored["encoder.layer.1.attention.attention.query.weight"]  # the hub's name for it
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(GuideError, match=r"guide\.path: .* lacks 1 weights"):
        guide_of(tmp_path)


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("config.json", b"{", "config.json"),
        ("config.json", b"{}", "model_type"),
        ("model.safetensors", 500, "header"),
        ("model.safetensors", -5, "incomplete"),
        ("config.json", {"hidden_size": 48}, r"is \[.*32\], but config.json says \[.*48\]"),
        ("config.json", {"num_attention_heads": 3}, r"is \[32\], but config.json says \[30\]"),
    ],
)
def test_a_damaged_checkpoint_is_one_line(checkpoint, tmp_path, capfd, file, damage, message):
    shutil.copytree(checkpoint, tmp_path / "c")
    content = (tmp_path / "c" / file).read_bytes()
    if isinstance(damage, dict):
        content = json.dumps({**json.loads(content), **damage}).encode()
    else:
        content = damage if isinstance(damage, bytes) else content[:damage]
    (tmp_path / "c" / file).write_bytes(content)
    with pytest.raises(GuideError, match=r"^guide\.path: .*c is damaged \(.*\): download .* again"):
        guide_of(tmp_path / "c")
    with pytest.raises(GuideError, match=message) as caught:
        guide_of(tmp_path / "c")
    assert "\n" not in str(caught.value)
    assert "MISMATCH" not in "".join(capfd.readouterr())


def test_in_bfloat16_it_answers_in_float32_and_nearly_the_same(checkpoint, monkeypatch):
    """As on a GPU: the weights are bfloat16, the identity that of the file."""
    plain = guide_of(checkpoint)
    monkeypatch.setattr(dinov2, "guide_dtype", lambda device: torch.bfloat16)
    guide = guide_of(checkpoint)
    assert {parameter.dtype for parameter in guide.parameters()} == {torch.bfloat16}
    assert {buffer.dtype for buffer in guide.buffers()} == {torch.float32}
    assert guide.info == plain.info
    images = random_images(4 * PATCH).requires_grad_()
    features = guide(images)
    assert features.dtype == torch.float32
    assert (features - plain(images)).norm() < 0.03 * plain(images).norm()
    (gradient,) = torch.autograd.grad(features.square().sum(), images)
    assert gradient.dtype == torch.float32 and gradient.abs().max() > 0
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            assert torch.equal(guide(images), features)


def test_another_network_is_refused(tmp_path):
    import transformers

    transformers.ViTModel(
        transformers.ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=1)
    ).save_pretrained(tmp_path)
    with pytest.raises(GuideError, match=r"guide\.path: .*'vit' network"):
        guide_of(tmp_path)


def test_random_weights_are_seeded_and_said_loudly(tmp_path, caplog):
    shape = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "image_size": 56}
    before = torch.get_rng_state()
    make_random_dinov2(tmp_path / "a", seed=1, **shape)
    assert torch.equal(torch.get_rng_state(), before)
    make_random_dinov2(tmp_path / "b", seed=1, **shape)
    make_random_dinov2(tmp_path / "c", seed=2, num_registers=2, **shape)
    with caplog.at_level(logging.WARNING):
        a, b, c = (guide_of(tmp_path / name) for name in "abc")
    assert a.info.weights_sha256 == b.info.weights_sha256 != c.info.weights_sha256
    assert a.info.random and "RANDOM" in a.info.label
    assert sum("RANDOM" in record.message for record in caplog.records) == 3
    assert c(random_images(56)).shape == (2, 32, 4, 4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c"]
    with pytest.raises(GuideError, match="exists"):
        make_random_dinov2(tmp_path / "a", seed=1, **shape)


def test_trained_weights_are_not_called_random(checkpoint, caplog):
    guide = guide_of(checkpoint)
    assert not guide.info.random
    assert guide.info.label == f"dinov2 ({Path(checkpoint).name})"
    assert not caplog.records


@pytest.mark.parametrize("registers", [False, True])
@pytest.mark.parametrize("changes", [{}, {"qkv_bias": False}, {"use_swiglu_ffn": True}], ids=str)
def test_a_fused_network_computes_the_same(registers, changes):
    """Also with scales of the branches that differ by channel, as trained ones do."""
    import transformers

    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 56}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if registers:
            config = transformers.Dinov2WithRegistersConfig(**shape, **changes)
            model = transformers.Dinov2WithRegistersModel(config).eval()
        else:
            model = transformers.Dinov2Model(transformers.Dinov2Config(**shape, **changes)).eval()
        for name, parameter in model.named_parameters():
            if "lambda1" in name or "bias" in name:
                torch.nn.init.normal_(parameter)
        pixels = torch.randn(2, 3, 56, 56, requires_grad=True)

    def run():
        output = model(pixel_values=pixels).last_hidden_state
        return output, *torch.autograd.grad(output[:, :, 0].sum(), pixels)

    want = run()
    dinov2.fuse(model)
    torch.testing.assert_close(run(), want, rtol=1e-4, atol=1e-5)
