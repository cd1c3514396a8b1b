"""The U-Net: shapes, what it is at the start, attention by hand."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dinogen.networks.unet import Norm, ResBlock, SelfAttention, UNet, Up, Variant, modulations


def small(resolution=16, **more):
    arguments = {
        "base_channels": 8,
        "channel_multipliers": (1, 2, 4),
        "num_blocks": 1,
        "attention_resolutions": (4,),
        "head_channels": 8,
    }
    return UNet(resolution, **arguments | more)


def disturbed(network):
    """The network with no parameter left at its special start."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network


def inputs(resolution=16, num=2):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(num, 3, resolution, resolution, generator=generator), torch.arange(num) * 400


@pytest.mark.parametrize(
    ("resolution", "more"),
    [
        (8, {}),
        (16, {"channel_multipliers": (1,), "attention_resolutions": ()}),
        (16, {"num_blocks": 3, "attention_resolutions": (16, 8, 4)}),
        (32, {"channel_multipliers": (1, 1, 2, 3), "base_channels": 24}),
        (64, {}),
    ],
)
def test_what_comes_out_has_the_shape_of_what_goes_in(resolution, more):
    x, t = inputs(resolution)
    more = {"attention_resolutions": ()} | more
    assert disturbed(small(resolution, **more))(x, t).shape == x.shape


def test_levels_halve_the_side_and_widen():
    network = small(32, attention_resolutions=())
    seen = []
    for module in network.modules():
        if isinstance(module, ResBlock):
            module.register_forward_hook(lambda m, a, out: seen.append(tuple(out.shape[1:3])))
    network(*inputs(32))
    down, middle, up = [(8, 32), (16, 16), (32, 8)], [(32, 8)] * 2, [(32, 8)] * 2
    assert seen == down + middle + up + [(16, 16)] * 2 + [(8, 32)] * 2


def test_blocks_attend_where_they_are_told_to_and_in_the_middle():
    network = small(32, attention_resolutions=(16,))
    attending = [n for n, m in network.named_modules() if isinstance(m, SelfAttention)]
    # down: one block per level, then a strided convolution; up: two blocks, then an upsampling
    assert attending == [
        "down.2.attention",
        "middle.0.attention",
        "up.3.attention",
        "up.4.attention",
    ]


def test_at_the_start_the_output_is_0_and_every_branch_is_absent():
    network = small()
    x, t = inputs()
    assert torch.equal(network(x, t), torch.zeros_like(x))
    block = ResBlock(8, 8, 32, 8)
    h = torch.randn(2, 8, 4, 4)
    ((scale, shift),) = modulations([block], torch.randn(2, 32), h.dtype)
    assert torch.equal(block(h, scale, shift), h)


def test_modulations_are_each_block_s_norm_scaled_and_shifted_by_the_embedding():
    blocks = [disturbed(ResBlock(8, width, 32, None)) for width in (8, 12)]
    embedding = torch.randn(2, 32)
    found = list(modulations(blocks, embedding, torch.float32))
    for block, pair in zip(blocks, found, strict=True):
        h = torch.randn(2, block.norm1.num_channels, 4, 4)
        scale, shift = block.affine(F.silu(embedding))[..., None, None].chunk(2, 1)
        expected = block.norm1(h) * (1 + scale) + shift
        own = (one[..., None, None] for one in pair)
        torch.testing.assert_close(block.norm1.modulated(h, *own), expected)


def test_up_is_a_convolution_of_the_nearest_upsample():
    up = disturbed(Up(6))
    x = torch.randn(2, 6, 3, 5)
    expected = up.conv(F.interpolate(x, scale_factor=2, mode="nearest"))
    torch.testing.assert_close(up(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("channels", "groups"), [(2, 1), (8, 2), (18, 3), (24, 6), (128, 32), (192, 32), (896, 32)]
)
def test_groups_of_a_norm_divide_the_channels_and_are_not_too_small(channels, groups):
    assert Norm(channels).num_groups == groups


def test_attention_is_that_of_torch():
    torch.manual_seed(0)
    ours = disturbed(SelfAttention(24, 8))
    reference = nn.MultiheadAttention(24, num_heads=3, batch_first=True)
    with torch.no_grad():
        reference.in_proj_weight.copy_(ours.qkv.weight.flatten(1))
        reference.in_proj_bias.copy_(ours.qkv.bias)
        reference.out_proj.weight.copy_(ours.proj.weight.flatten(1))
        reference.out_proj.bias.copy_(ours.proj.bias)
    x = torch.randn(2, 24, 4, 5)
    tokens = F.group_norm(x, 6, ours.norm.weight, ours.norm.bias).flatten(2).transpose(1, 2)
    attended, _ = reference(tokens, tokens, tokens)
    expected = x + attended.transpose(1, 2).reshape(x.shape)
    torch.testing.assert_close(ours(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_classes", [0, 3])
def test_every_parameter_gets_a_gradient(num_classes):
    network = disturbed(small(num_classes=num_classes))
    x, t = inputs()
    label = torch.tensor([0, 3]) if num_classes else None
    network(x, t, label).square().sum().backward()
    dead = {n for n, p in network.named_parameters() if p.grad is None or not p.grad.any()}
    assert dead == set()


def test_at_the_start_every_parameter_has_a_gradient_even_if_0():
    network = small()
    network(*inputs()).sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_time_and_label_change_the_output_of_their_own_sample_only():
    network = disturbed(small(num_classes=2))
    x, t = inputs()
    label = torch.tensor([0, 1])
    before = network(x, t, label)
    for changed in (
        network(x, t + torch.tensor([0, 7]), label),
        network(x, t, torch.tensor([0, 2])),
    ):
        torch.testing.assert_close(changed[0], before[0])
        assert (changed[1] - before[1]).abs().max() > 1e-3


def test_a_pixel_can_change_every_pixel():
    network = disturbed(small())
    x, t = inputs(num=1)
    moved = x.clone()
    moved[0, :, 0, 0] += 1
    assert ((network(moved, t) - network(x, t)).abs().amax(1) > 0).float().mean() > 0.9


def test_bf16_autocast_is_near_and_gives_float32():
    network = disturbed(small())
    x, t = inputs()
    exact = network(x, t)
    with torch.autocast("cpu", torch.bfloat16):
        rough = network(x, t)
    assert rough.dtype == torch.float32
    assert (rough - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"attention_resolutions": (5,)}, "no side 5: sides are [16, 8, 4]"),
        ({"channel_multipliers": (1,) * 6}, "channel_multipliers"),
        ({"channel_multipliers": ()}, "channel_multipliers"),
        ({"base_channels": 7}, "base_channels 7"),
        ({"head_channels": 12}, "head_channels 12"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(more, named):
    with pytest.raises(ValueError) as error:
        small(**more)
    assert named in str(error.value)


VARIANTS = {
    "blocks": {"resampling": "block", "norm_groups": 4},
    "no scale": {"scale": False, "norm_eps": 1e-6, "middle_norm": False},
    "elsewhere": {"downsample_padding": "end", "last_frequency": "exact", "num_heads": 2},
    "time": {"time_scale": 0.25, "time_channels": 16},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_learns_at_every_weight_and_in_bf16(name):
    network = disturbed(small(variant=VARIANTS[name]))
    x, t = inputs()
    out = network(x, t)
    assert out.shape == x.shape and out.std() > 0
    assert not torch.allclose(out, network(x, t + 100))
    out.square().mean().backward()
    silent = [n for n, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []
    with torch.autocast("cpu", torch.bfloat16):
        assert (network(x, t) - out).norm() < 0.05 * out.norm()


def test_a_variant_may_be_given_as_its_attributes():
    own = VARIANTS["time"]
    assert small(variant=own).variant == Variant(**own)
    assert small(variant=own).time[0].in_features == 16
    assert small().variant == Variant()


@pytest.mark.parametrize(
    ("variant", "message"),
    [
        ({"norm_groups": 3}, "unet.norm_groups 3 do not divide 8 channels"),
        ({"num_heads": 3}, "unet.num_heads 3 do not divide 32 channels"),
        ({"time_channels": 15}, "15 time channels"),
    ],
)
def test_a_variant_that_does_not_fit_is_named(variant, message):
    with pytest.raises(ValueError, match=message):
        small(variant=variant)
