"""The PatchGAN discriminator: its receptive field by gradient, shapes, and batch independence."""

import pytest
import torch
from torch import nn

from dinogen.networks.patchgan import (
    MultiScalePatchDiscriminator,
    PatchDiscriminator,
    num_patches,
)


def small(num_layers=3):
    torch.manual_seed(0)
    return PatchDiscriminator(num_layers, base_channels=8)


def without_norm(D):
    """Group norm ties every place to the whole map; the convolutions alone have a field."""
    for name, module in list(D.layers.named_children()):
        if isinstance(module, nn.GroupNorm):
            setattr(D.layers, name, nn.Identity())
    return D


@pytest.mark.parametrize(("num_layers", "field"), [(1, 16), (2, 34), (3, 70)])
def test_the_receptive_field_is_that_of_the_paper(num_layers, field):
    D = without_norm(small(num_layers)).double()
    image = torch.randn(1, 3, 192, 192, dtype=torch.float64, requires_grad=True)
    logits = D(image)
    middle = logits.shape[-1] // 2
    (gradient,) = torch.autograd.grad(logits[0, middle, middle], image)
    seen = gradient[0].abs().sum(0) > 0
    rows, columns = seen.any(1).nonzero().flatten(), seen.any(0).nonzero().flatten()
    for places in (rows, columns):
        assert len(places) == places[-1] - places[0] + 1 == field
    assert rows[0] > 0 and rows[-1] < 191


@pytest.mark.parametrize(
    ("resolution", "num_layers"), [(16, 1), (16, 2), (32, 3), (64, 3), (128, 3), (128, 5)]
)
def test_logits_are_as_many_as_promised(resolution, num_layers):
    side = num_patches(resolution, num_layers)
    assert side >= 1
    logits = small(num_layers)(torch.randn(2, 3, resolution, resolution))
    assert logits.shape == (2, side, side)


def test_where_no_patch_fits_it_says_so():
    assert num_patches(16, 3) < 1
    with pytest.raises(RuntimeError):
        small(3)(torch.randn(1, 3, 16, 16))


def test_a_image_s_logits_do_not_depend_on_the_rest_of_the_batch():
    D, x = small(2).double(), torch.randn(4, 3, 32, 32).double()
    for training in (True, False):
        D.train(training)
        torch.testing.assert_close(D(x)[2:3], D(x[2:3]))
        torch.testing.assert_close(D(torch.cat([x[2:], 10 * x[:2]]))[:2], D(x)[2:])


def test_contrast_is_not_normalised_away():
    D, x = small(2), torch.randn(1, 3, 32, 32)
    assert not torch.allclose(D(x), D(0.5 * x), rtol=0.01)


def test_the_widths_are_those_of_the_paper():
    convolutions = [m for m in PatchDiscriminator().modules() if isinstance(m, nn.Conv2d)]
    assert [conv.out_channels for conv in convolutions] == [64, 128, 256, 512, 1]
    assert [conv.stride[0] for conv in convolutions] == [2, 2, 2, 1, 1]


def test_every_parameter_gets_a_gradient():
    D = small()
    D(torch.randn(2, 3, 64, 64)).square().sum().backward()
    assert [name for name, p in D.named_parameters() if not p.grad.abs().sum()] == []


def test_under_autocast_logits_are_float32():
    with torch.autocast("cpu", torch.bfloat16):
        assert small(1)(torch.randn(1, 3, 16, 16)).dtype == torch.float32


def test_each_scale_reads_the_image_at_half_the_size():
    torch.manual_seed(0)
    D, x = MultiScalePatchDiscriminator(3, num_layers=1, base_channels=8), torch.randn(2, 3, 32, 32)
    found = D(x)
    assert [one.shape[1] for one in found] == [num_patches(size, 1) for size in (32, 16, 8)]
    for i, logits in enumerate(found):
        factor = 2**i
        rows = [x[:, :, a::factor, b::factor] for a in range(factor) for b in range(factor)]
        shrunk = torch.stack(rows).mean(0)
        torch.testing.assert_close(logits, D.scales[i](shrunk))
    weights = [scale.layers[0].weight for scale in D.scales]
    assert not torch.equal(weights[0], weights[1])


def test_every_parameter_of_every_scale_gets_a_gradient():
    D = MultiScalePatchDiscriminator(2, num_layers=2, base_channels=8)
    sum(one.square().sum() for one in D(torch.randn(2, 3, 32, 32))).backward()
    assert [name for name, p in D.named_parameters() if not p.grad.abs().sum()] == []
