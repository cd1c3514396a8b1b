"""Heads on feature maps: their norms by SVD, batch independence, and when they iterate."""

import pytest
import torch
from torch import nn

from dinogen.networks.layers import update_spectral_norms
from dinogen.networks.projected import ProjectedHeads


def heads(num_channels=(5, 12), width=16):
    torch.manual_seed(0)
    return ProjectedHeads(num_channels, width)


def maps(num=4, sizes=(4, 6)):
    generator = torch.Generator().manual_seed(1)
    shapes = zip((5, 12), sizes, strict=True)
    return [3 * torch.randn(num, c, g, g, generator=generator) for c, g in shapes]


def test_each_layer_has_its_head_and_each_place_a_logit():
    logits = heads()(maps())
    assert [tuple(one.shape) for one in logits] == [(4, 4, 4), (4, 6, 6)]
    with pytest.raises(ValueError):
        heads()(maps()[:1])


def test_every_convolution_has_spectral_norm_1():
    D = heads()
    convolutions = [m for m in D.modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) == 2 * 3
    with torch.no_grad():
        for convolution in convolutions:
            convolution.parametrizations.weight.original.add_(
                0.3 * torch.randn_like(convolution.weight)
            )
    for _ in range(300):
        update_spectral_norms(D)
    for convolution in convolutions:
        largest = torch.linalg.svdvals(convolution.weight.flatten(1))[0]
        assert largest.item() == pytest.approx(1, abs=1e-3)


def test_forwards_do_not_iterate_but_an_update_does():
    D = heads().train()
    with torch.no_grad():
        for parameter in D.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    before = {name: b.clone() for name, b in D.named_buffers()}
    assert len(before) == 2 * 2 * 3
    D(maps()), D(maps())
    assert all(torch.equal(b, before[name]) for name, b in D.named_buffers())
    update_spectral_norms(D)
    moved = [name for name, b in D.named_buffers() if not torch.equal(b, before[name])]
    # the last convolution has one row, whose u is 1 or -1 for good
    assert len(moved) >= len(before) - 2


@pytest.mark.parametrize("training", [True, False])
def test_a_image_s_logits_do_not_depend_on_the_rest_of_the_batch(training):
    D, x = heads().double().train(training), [one.double() for one in maps()]
    alone = D([one[2:3] for one in x])
    beside = D([torch.cat([one[2:], 10 * one[:2]]) for one in x])
    for whole, one, other in zip(D(x), alone, beside, strict=True):
        torch.testing.assert_close(whole[2:3], one)
        torch.testing.assert_close(whole[2:], other[:2])


def test_a_head_sees_its_own_layer_alone():
    D, x = heads(), maps()
    changed = D([x[0], torch.flip(x[1], (2,))])
    assert torch.equal(changed[0], D(x)[0])
    assert not torch.allclose(changed[1], D(x)[1], atol=1e-3)


def test_every_parameter_gets_a_gradient():
    D = heads()
    sum(one.square().sum() for one in D(maps())).backward()
    assert [name for name, p in D.named_parameters() if not p.grad.abs().sum()] == []


def test_under_autocast_logits_are_float32():
    with torch.autocast("cpu", torch.bfloat16):
        logits = heads()(maps())
    assert {one.dtype for one in logits} == {torch.float32}


def test_on_meta_it_has_as_many_parameters_as_one_counts():
    with torch.device("meta"):
        D = ProjectedHeads([384, 384], width=128)
    one = (384 * 128 + 128) + (128 * 128 * 9 + 128) + 2 * 2 * 128 + (128 + 1)
    assert sum(p.numel() for p in D.parameters()) == 2 * one
