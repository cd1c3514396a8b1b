"""StyleGAN2's generator: shapes, truncation, noise, skips, precision."""

import pytest
import torch
from torch import nn

from dinogen.networks.layers import binomial, upsample
from dinogen.networks.stylegan2.generator import StyleGAN2Generator


def small(resolution=16, **more):
    torch.manual_seed(0)
    size = {"z_dim": 8, "w_dim": 6, "channel_base": 128, "channel_max": 8}
    return StyleGAN2Generator(resolution, **size | more)


@pytest.mark.parametrize("resolution, num_ws", [(4, 2), (8, 4), (16, 6), (64, 10)])
def test_shapes(resolution, num_ws):
    G = small(resolution)
    assert G(torch.randn(2, 8)).shape == (2, 3, resolution, resolution)
    assert G.synthesis.num_ws == num_ws  # two per resolution
    sizes = [4 << i for i in range(num_ws // 2)]
    assert G.synthesis.num_noise == sum(2 * s * s for s in sizes) - 16


def test_a_resolution_that_is_no_power_of_two_is_refused():
    with pytest.raises(ValueError, match="12"):
        small(12)


def test_layers_have_the_sizes_that_the_authors_code_prints():
    def num(*modules):
        return sum(p.numel() for module in modules for p in module.parameters())

    with torch.device("meta"):
        G, wide = StyleGAN2Generator(256), StyleGAN2Generator(256, channel_base=32768)
    assert num(*G.mapping.layers) == 2 * 262_656
    four, eight = G.synthesis.blocks["4"], G.synthesis.blocks["8"]
    assert num(four.layers[0]) == num(eight.layers[0]) == num(eight.layers[1]) == 2_622_465
    assert num(eight.to_rgb) + eight.rgb_bias.numel() == 264_195
    assert four.const.numel() == 8192
    block = wide.synthesis.blocks["128"]
    assert [num(layer) for layer in block.layers] == [1_442_561, 721_409]
    assert num(block.to_rgb) + block.rgb_bias.numel() == 132_099


def test_truncation_moves_w_towards_its_mean():
    G = small()
    z = torch.randn(5, 8)
    G.w_avg.copy_(torch.randn(6))
    torch.testing.assert_close(
        G.truncate(G.mapping(z), 0.3), G.w_avg + 0.3 * (G.mapping(z) - G.w_avg)
    )
    at_mean = G.synthesis(G.broadcast(G.w_avg[None]))
    torch.testing.assert_close(G(z, psi=0.0), at_mean.expand(5, -1, -1, -1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(G(z), G.synthesis(G.broadcast(G.mapping(z))))


def test_noise_reaches_each_layer_at_its_own_place():
    G = small()
    for name, parameter in G.named_parameters():
        if name.endswith("noise_strength"):
            nn.init.constant_(parameter, 0.5)
    z, noise = torch.randn(2, 8), torch.randn(2, G.synthesis.num_noise)
    constant = torch.cat([b.flatten() for n, b in G.named_buffers() if n.endswith("noise")]).expand(
        2, -1
    )
    torch.testing.assert_close(G(z, noise=constant), G(z))
    assert not torch.allclose(G(z, noise=noise), G(z), atol=1e-3)
    # the last pixel's noise of the last layer changes that pixel alone
    other = noise.clone()
    other[0, -1] += 1
    changed = (G(z, noise=other) - G(z, noise=noise)).abs().amax(1) > 1e-6
    assert changed.nonzero().tolist() == [[0, 15, 15]]


def test_no_noise_where_its_strength_is_zero():
    G = small()
    z = torch.randn(2, 8)
    torch.testing.assert_close(G(z, noise=torch.randn(2, G.synthesis.num_noise)), G(z))


def test_the_image_is_the_sum_of_all_resolutions():
    G = small()
    seen = []
    for block in G.synthesis.blocks.values():
        block.to_rgb.register_forward_hook(lambda module, args, out: seen.append(out))
    image = G(torch.randn(2, 8))
    expected = seen[0]
    for rgb in seen[1:]:
        expected = upsample(expected, 4 * binomial()) + rgb
    torch.testing.assert_close(image, expected)


def test_a_later_w_leaves_what_comes_before_alone():
    G = small()
    ws = torch.randn(2, 6, 6)
    seen = []
    for size in ("4", "8", "16"):
        block = G.synthesis.blocks[size]
        block.register_forward_hook(lambda module, args, out: seen.append(out[0].detach()))
    G.synthesis(ws)
    other = ws.clone()
    other[:, 3:] += 1  # 4x4 has number 0, 8x8 numbers 1 and 2, and ToRGB the one after
    G.synthesis(other)
    same = [torch.equal(a, b) for a, b in zip(seen[:3], seen[3:], strict=True)]
    assert same == [True, True, False]


def test_every_parameter_gets_a_gradient():
    G = small(num_classes=2)
    noise = torch.randn(2, G.synthesis.num_noise)
    G(torch.randn(2, 8), torch.tensor([0, 1]), noise).square().sum().backward()
    assert [name for name, p in G.named_parameters() if p.grad is None] == []


def test_only_the_largest_blocks_follow_autocast():
    z = torch.randn(2, 8)
    with torch.no_grad():
        full = small(num_half=0)
        exact = full(z)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(full(z), exact)
            mixed = small(num_half=1)(z)
    assert mixed.dtype == torch.float32
    assert not torch.equal(mixed, exact)
    torch.testing.assert_close(mixed, exact, rtol=0.1, atol=0.1)
