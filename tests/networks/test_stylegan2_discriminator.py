"""StyleGAN2's discriminator: shapes, groups, projection, blocks by hand, gradients."""

import math

import pytest
import torch
from torch.nn import functional as F

from dinogen.networks.layers import binomial, conv_down
from dinogen.networks.stylegan2.discriminator import DiscriminatorBlock, StyleGAN2Discriminator


def small(resolution=16, **more):
    torch.manual_seed(0)
    return StyleGAN2Discriminator(resolution, **{"channel_base": 128, "channel_max": 8} | more)


@pytest.mark.parametrize("resolution", [4, 8, 32])
def test_shapes(resolution):
    assert small(resolution)(torch.randn(5, 3, resolution, resolution)).shape == (5,)


def test_layers_have_the_sizes_that_the_authors_code_prints():
    def num(module):
        return sum(p.numel() for p in module.parameters())

    with torch.device("meta"):
        D = StyleGAN2Discriminator(1024, channel_base=32768)
    assert num(D.from_rgb) == 128
    first, b128 = D.blocks[0], D.blocks[3]
    assert [num(layer) for layer in (first.skip, first.conv0, first.conv1)] == [2048, 9248, 18496]
    sizes = [num(layer) for layer in (b128.skip, b128.conv0, b128.conv1)]
    assert sizes == [131_072, 590_080, 1_180_160]


def test_logits_depend_on_the_own_group_alone():
    D = small()
    images = torch.randn(8, 3, 16, 16)
    whole = D(images)
    torch.testing.assert_close(torch.cat([D(images[:4]), D(images[4:])]), whole)
    other = images.clone()
    other[7] = 0
    assert torch.equal(D(other)[:4], whole[:4])
    assert (D(other)[4:] != whole[4:]).all()


def test_a_block_by_hand():
    torch.manual_seed(0)
    block = DiscriminatorBlock(4, 6, half=True)
    x = torch.randn(2, 4, 8, 8)

    def act(y):
        return F.leaky_relu(y, 0.2) * math.sqrt(2)

    y = act(F.conv2d(x, block.conv0.weight / 6, padding=1))
    y = act(conv_down(y, block.conv1.weight / 6, binomial()))
    skip = conv_down(x, block.skip.weight / 2, binomial())
    torch.testing.assert_close(block(x), (y + skip) / math.sqrt(2))


def test_labels_project():
    D = small(num_classes=3)
    images = torch.randn(1, 3, 16, 16).expand(3, -1, -1, -1)
    label = torch.tensor([0, 1, 2])
    logits = D(images, label)
    assert torch.pdist(logits[:, None]).min() > 1e-4
    found = []
    D.logit.register_forward_hook(lambda module, args, out: found.append(out))
    logits = D(images, label)
    expected = (found[0] * D.label(None, label)).sum(1) / math.sqrt(8)
    torch.testing.assert_close(logits, expected)


def test_gradients_flow_to_images_and_all_parameters():
    D = small(num_classes=2)
    images = torch.randn(4, 3, 16, 16, requires_grad=True)
    D(images, torch.tensor([0, 1, 1, 0])).sum().backward()
    assert images.grad.flatten(1).norm(dim=1).min() > 0
    assert [name for name, p in D.named_parameters() if p.grad is None] == []


def test_only_the_largest_blocks_follow_autocast():
    images = torch.randn(4, 3, 16, 16)
    with torch.no_grad():
        full = small(num_half=0)
        exact = full(images)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(full(images), exact)
            mixed = small(num_half=2)(images)
    assert mixed.dtype == torch.float32
    assert not torch.equal(mixed, exact)
    torch.testing.assert_close(mixed, exact, rtol=0.2, atol=0.2)
