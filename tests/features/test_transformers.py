"""Guides that are vision transformers against the hidden states of transformers and timm."""

from __future__ import annotations

import copy
import json
import logging
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from dinogen.config import GuideConfig
from dinogen.errors import UserError
from dinogen.features import Guide, GuideError, load_guide, same_guide
from dinogen.features.load import layer_channels
from tests.tiny_guides import HIDDEN, KINDS, MEAN, NUM_LAYERS, STD, TIMM, shaken, write

CPU = torch.device("cpu")
# CLS, distillation and register tokens
NUM_SPECIAL = {
    "dinov3": 5,
    "dinov3_gated": 1,
    "siglip": 0,
    "siglip_vision": 0,
    "naflex": 0,
    "vit": 1,
    "dino": 1,
    "deit": 2,
    "ijepa": 0,
    "timm": 5,
    "timm_dinov3": 5,
    "timm_siglip": 0,
    "timm_distilled": 2,
}
PLAIN = [kind for kind in KINDS if kind not in TIMM]


class Checkpoints(dict):
    """By kind: the folder and the network in it, written when they are first needed."""

    def __init__(self, root):
        super().__init__()
        self.root = root

    def __missing__(self, kind):
        self[kind] = (self.root / kind, write(kind, self.root / kind))
        return self[kind]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    return Checkpoints(tmp_path_factory.mktemp("guides"))


def guide_of(kind, folder, **changes):
    return load_guide(GuideConfig(name=KINDS[kind][0], path=str(folder), **changes), CPU)


def random_images(size, num=2):
    return torch.rand(num, 3, size, size, generator=torch.Generator().manual_seed(size)) * 2 - 1


def normalized(images):
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    return (images / 2 + 0.5 - mean) / std


def cut_into_patches(pixels, patch):
    """As Siglip2ImageProcessor does, one after the other: (B, locations, rows * columns * 3)."""
    grid = pixels.shape[-1] // patch
    return torch.stack(
        [
            pixels[:, :, y * patch : (y + 1) * patch, x * patch : (x + 1) * patch]
            .permute(0, 2, 3, 1)
            .flatten(1)
            for y in range(grid)
            for x in range(grid)
        ],
        1,
    )


def hidden_states(kind, model, pixels):
    """Behind each block, and the last one behind the final norm; as the network itself says."""
    if kind == "siglip":
        model = model.vision_model
    if kind == "vit":
        model = model.vit
    if kind in TIMM:
        seen = []
        model = copy.deepcopy(model)  # the next line resamples its position embedding
        for block in model.blocks:
            block.register_forward_hook(lambda *given: seen.append(given[2]))
        model.set_input_size(tuple(pixels.shape[-2:]))
        last = model.forward_features(pixels)
        return seen, last
    model.set_attn_implementation("eager")
    arguments = {}
    if kind == "naflex":
        patch = KINDS[kind][1]
        grid = pixels.shape[-1] // patch
        pixels = cut_into_patches(pixels, patch)
        arguments["pixel_attention_mask"] = torch.ones(pixels.shape[:2], dtype=torch.long)
        arguments["spatial_shapes"] = torch.tensor([[grid, grid]] * len(pixels))
    elif not kind.startswith("dinov3"):
        arguments["interpolate_pos_encoding"] = True
    output = model(pixels, output_hidden_states=True, **arguments)
    return output.hidden_states[1:], output.last_hidden_state


def norm_of(kind, model):
    if kind == "siglip":
        return model.vision_model.post_layernorm
    if kind == "vit":
        return model.vit.layernorm
    names = ("post_layernorm", "layernorm", "norm")
    return next(getattr(model, name) for name in names if hasattr(model, name))


def expected_map(kind, model, images, layer=-1):
    """(B, C, g, g), one place after the other."""
    states, last = hidden_states(kind, model, normalized(images))
    assert len(states) == NUM_LAYERS
    hidden = last if layer in (-1, NUM_LAYERS) else norm_of(kind, model)(states[layer - 1])
    grid, first = images.shape[-1] // KINDS[kind][1], NUM_SPECIAL[kind]
    assert hidden.shape[1] == first + grid * grid
    rows = [
        torch.stack([hidden[:, first + row * grid + column] for column in range(grid)], -1)
        for row in range(grid)
    ]
    return torch.stack(rows, -2)


@pytest.mark.parametrize("grid", [4, 5, 7])
@pytest.mark.parametrize("kind", KINDS)
def test_features_and_pixel_gradients_are_those_of_the_network(checkpoints, kind, grid):
    """Smaller, as large and larger than the images that it was trained on."""
    folder, model = checkpoints[kind]
    guide = guide_of(kind, folder)
    patch = KINDS[kind][1]
    assert isinstance(guide, Guide) and guide.input_size(grid) == grid * patch
    images = random_images(grid * patch).requires_grad_()
    features = guide(images)
    probe = torch.randn(features.shape, generator=torch.Generator().manual_seed(1))
    (gradient,) = torch.autograd.grad((features * probe).sum(), images)
    expected = expected_map(kind, model, images)
    (expected_gradient,) = torch.autograd.grad((expected * probe).sum(), images)
    assert features.shape == (2, HIDDEN, grid, grid) and features.dtype == torch.float32
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=2e-5)
    scale = expected_gradient.abs().max()
    assert scale > 1e-3
    torch.testing.assert_close(gradient / scale, expected_gradient / scale, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("layers", [(1,), (3, 1), (-2, -1)])
@pytest.mark.parametrize("kind", KINDS)
def test_layers_are_behind_their_blocks_and_the_norm(checkpoints, kind, layers):
    folder, model = checkpoints[kind]
    guide = guide_of(kind, folder, layer=layers)
    images = random_images(4 * KINDS[kind][1])
    counted = [layer if layer > 0 else NUM_LAYERS + 1 + layer for layer in layers]
    expected = torch.cat([expected_map(kind, model, images, layer) for layer in counted], 1)
    torch.testing.assert_close(guide(images), expected, rtol=1e-4, atol=2e-5)
    assert guide.info.layer == (counted if len(counted) > 1 else counted[0])
    config = GuideConfig(name=KINDS[kind][0], path=str(folder), layer=layers)
    assert layer_channels(config) == (HIDDEN,) * len(layers)
    assert guide.info.num_channels == HIDDEN * len(layers)
    assert guide.info.name == KINDS[kind][0]


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_without_autocast_and_in_bfloat16(checkpoints, kind, monkeypatch):
    folder, _ = checkpoints[kind]
    guide = guide_of(kind, folder)
    parent = torch.nn.ModuleList([guide]).train()
    assert parent.training and not any(module.training for module in guide.modules())
    assert not any(parameter.requires_grad for parameter in guide.parameters())
    images = random_images(4 * KINDS[kind][1]).requires_grad_()
    plain = guide(images)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(guide(images), plain)
    module = f"dinogen.features.{KINDS[kind][0]}.guide_dtype"
    monkeypatch.setattr(module, lambda device: torch.bfloat16)
    short = guide_of(kind, folder)
    assert {parameter.dtype for parameter in short.parameters()} == {torch.bfloat16}
    assert short.info == guide.info
    features = short(images)
    assert features.dtype == torch.float32
    assert (features - plain).norm() < 0.05 * plain.norm()
    (gradient,) = torch.autograd.grad(features.square().sum(), images)
    assert gradient.dtype == torch.float32 and gradient.abs().max() > 0


@pytest.mark.parametrize("kind", ["dinov3", "siglip", "vit", "timm"])
def test_what_does_not_fit_is_one_clear_error(checkpoints, kind, tmp_path):
    folder, _ = checkpoints[kind]
    guide, patch = guide_of(kind, folder), KINDS[kind][1]
    for shape in ((4 * patch + 1,) * 2, (4 * patch, 5 * patch)):
        with pytest.raises(ValueError, match=f"multiple of {patch} pixels, not {shape[0]}x"):
            guide(torch.zeros(1, 3, *shape))
    for layer in (0, 4, -4, "pool1", (3, -1)):
        with pytest.raises(GuideError, match=r"guide\.layer: "):
            guide_of(kind, folder, layer=layer)
    shutil.copytree(folder, tmp_path / "part")
    stored = load_file(folder / "model.safetensors")
    name = next(
        name for name in sorted(stored) if "norm" in name and ".1." in name and "text" not in name
    )
    save_file(
        {key: value for key, value in stored.items() if key != name},
        tmp_path / "part" / "model.safetensors",
        metadata={"format": "pt"},
    )
    with pytest.raises(GuideError, match=r"^guide\.path: .*part lacks 1 weights \(.*norm"):
        guide_of(kind, tmp_path / "part")
    stored[name] = stored[name][:-1].clone()
    save_file(stored, tmp_path / "part" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(GuideError, match=r"is damaged \(.*norm.* is \[31\].* \[32\]\)"):
        guide_of(kind, tmp_path / "part")
    (tmp_path / "part" / "config.json").write_text("{")
    with pytest.raises(GuideError, match=r"^guide\.path: .*part is damaged \(.*\): download"):
        guide_of(kind, tmp_path / "part")
    with pytest.raises(GuideError, match=r"^guide\.path: nobody/nothing: .*cannot be downloaded"):
        guide_of(kind, "nobody/nothing")


@pytest.mark.parametrize(
    ("kind", "name", "message"),
    [
        ("siglip", "dinov3", "'siglip' network: give a DINOv3 checkpoint, such as facebook/dinov3"),
        ("dinov3", "dinov2", "'dinov3_vit' network: give a DINOv2 checkpoint"),
        ("timm", "siglip", "'timm_wrapper' network: give a SigLIP"),
        ("dinov3", "timm", "'dinov3_vit' network of transformers: give a timm checkpoint"),
    ],
)
def test_another_network_is_refused_by_its_name(checkpoints, kind, name, message):
    config = GuideConfig(name=name, path=str(checkpoints[kind][0]))
    with pytest.raises(GuideError, match=rf"^guide\.path: .* holds a {message}"):
        load_guide(config)
    if name != "dinov2":  # its config.json is read without transformers
        with pytest.raises(GuideError, match=rf"^guide\.path: .* holds a {message}"):
            layer_channels(config)


def test_each_guide_has_weights_of_its_own():
    paths = {name: GuideConfig(name=name).path for name in ("dinov2", "dinov3", "siglip", "timm")}
    assert paths["dinov2"] == "facebook/dinov2-small"
    assert paths["dinov3"].startswith("facebook/dinov3-vits16")
    assert paths["siglip"].startswith("google/siglip2-") and paths["timm"].startswith("timm/")
    assert GuideConfig(name="dinov3", path="here").path == "here"


@pytest.mark.parametrize("kind", PLAIN)
def test_normalisation_is_the_checkpoints_own_and_part_of_the_identity(tmp_path, kind, caplog):
    with caplog.at_level(logging.WARNING):
        write(kind, tmp_path / "said")
        said = guide_of(kind, tmp_path / "said")
        assert not caplog.records
        write(kind, tmp_path / "unsaid", preprocessor=False)
        usual = guide_of(kind, tmp_path / "unsaid")
    assert len(caplog.records) == 1 and "lacks preprocessor_config.json" in caplog.text
    assert not same_guide(said.info.to_dict(), usual.info)
    of_imagenet = usual.scale.flatten().tolist() == pytest.approx(
        [0.5 / 0.229, 0.5 / 0.224, 0.5 / 0.225]
    )
    assert of_imagenet == kind.startswith("dinov3")
    (tmp_path / "said" / "preprocessor_config.json").write_text('{"image_mean": [0.5]}')
    with pytest.raises(GuideError, match=r"^guide\.path: .*said is damaged"):
        guide_of(kind, tmp_path / "said")


@pytest.mark.parametrize("kind", ["dinov3", "siglip", "timm"])
def test_random_weights_are_said_loudly(checkpoints, tmp_path, kind, caplog):
    shutil.copytree(checkpoints[kind][0], tmp_path / "random")
    file = tmp_path / "random" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "dinogen_random_weights": True}))
    guide = guide_of(kind, tmp_path / "random")
    assert guide.info.random and "RANDOM" in guide.info.label and "RANDOM GUIDE" in caplog.text
    caplog.clear()
    assert not guide_of(kind, checkpoints[kind][0]).info.random and not caplog.records


def test_patches_that_are_not_square_are_refused(tmp_path):
    write("dinov3", tmp_path / "c", patch_size=[16, 8], image_size=64)
    with pytest.raises(GuideError, match=r"guide\.path: .*patches of \[16, 8\] pixels"):
        guide_of("dinov3", tmp_path / "c")


def test_timm_networks_of_one_image_size_are_refused(checkpoints, tmp_path, monkeypatch):
    shutil.copytree(checkpoints["timm"][0], tmp_path / "c")
    file = tmp_path / "c" / "config.json"
    settings = json.loads(file.read_text())
    for architecture, message in [
        ("beit_base_patch16_224", "timm's beit_base_patch16_224 .*vision transformers"),
        ("swin_tiny_patch4_window7_224", "timm's swin_tiny_patch4_window7_224 .*vision transf"),
        ("resnet18", "timm's resnet18 .*vision transformers"),
        ("vit_of_tomorrow", "timm .* does not know vit_of_tomorrow"),
    ]:
        file.write_text(json.dumps({**settings, "architecture": architecture, "model_args": {}}))
        with pytest.raises(GuideError, match=rf"^guide\.path: .*{message}"):
            guide_of("timm", tmp_path / "c")
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with pytest.raises(UserError, match=r"pip install 'dinogen\[timm\]'"):
        guide_of("timm", checkpoints["timm"][0])


@pytest.fixture(scope="module")
def convnext(tmp_path_factory):
    import transformers

    folder = tmp_path_factory.mktemp("convnext") / "c"
    shape = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 2, 1]}
    torch.manual_seed(0)
    model = shaken(transformers.DINOv3ConvNextModel(transformers.DINOv3ConvNextConfig(**shape)))
    model.save_pretrained(folder)
    settings = {"image_mean": MEAN, "image_std": STD}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder, model


@pytest.mark.parametrize("layers", [(-1,), (1,), (3, 1), (2, 4)])
def test_stages_of_a_convnext_are_averaged_to_the_last_ones_grid(convnext, layers):
    folder, model = convnext
    config = GuideConfig(name="dinov3", path=str(folder), layer=layers)
    guide = load_guide(config, CPU)
    counted = [layer if layer > 0 else 4 for layer in layers]
    stride = {1: 4, 2: 8, 3: 16, 4: 32}[max(counted)]
    grid = 96 // stride
    assert guide.input_size(grid) == 96 and layer_channels(config) == tuple(
        {1: 8, 2: 16, 3: 24, 4: 32}[stage] for stage in counted
    )
    images = random_images(96).requires_grad_()
    output = model(normalized(images), output_hidden_states=True)
    maps = dict(enumerate(output.hidden_states))
    maps[4] = output.last_hidden_state[:, 1:].transpose(1, 2)
    expected = []
    for stage in counted:
        if stage == 4:
            expected.append(maps[4].reshape(2, 32, 3, 3))
            continue
        cells = (grid, maps[stage].shape[-1] // grid)
        expected.append(maps[stage].unflatten(3, cells).unflatten(2, cells).mean((3, 5)))
    features = guide(images)
    torch.testing.assert_close(features, torch.cat(expected, 1), rtol=1e-4, atol=1e-5)
    (gradient,) = torch.autograd.grad(features.square().sum(), images)
    assert gradient.abs().max() > 0 and guide.info.num_channels == features.shape[1]
    with pytest.raises(ValueError, match=f"multiple of {stride} pixels"):
        guide(torch.zeros(1, 3, stride + 2, stride + 2))
    with pytest.raises(GuideError, match=r"guide\.layer: 5 is not one of the network's 4"):
        load_guide(GuideConfig(name="dinov3", path=str(folder), layer=5), CPU)


def test_timm_makes_its_rotations_once_per_grid(checkpoints, monkeypatch):
    """They are made on the host, and a step on a GPU would wait for their copy."""
    guide = guide_of("timm_dinov3", checkpoints["timm_dinov3"][0])
    rope = guide.model.rope.rope
    made, get_embed = [], rope.get_embed
    monkeypatch.setattr(rope, "get_embed", lambda shape: made.append(shape) or get_embed(shape))
    with torch.inference_mode():
        first = guide(random_images(64))
    images = random_images(64).requires_grad_()
    again = guide(images)
    assert torch.equal(again, first)
    (gradient,) = torch.autograd.grad(again.square().sum(), images)
    assert gradient.abs().max() > 0
    guide(random_images(96))
    assert made == [(4, 4), (6, 6)]
