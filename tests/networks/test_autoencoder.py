"""The convolutional VAE's network: shapes, range, and that images do not meet in a batch."""

import pytest
import torch
from torch import nn

from dinogen.networks.autoencoder import Autoencoder


def small(resolution=16, latent=6):
    torch.manual_seed(0)
    return Autoencoder(resolution, latent, base_channels=8)


@pytest.mark.parametrize("resolution", [16, 32, 64, 128, 256])
def test_shapes_and_range(resolution):
    G = small(resolution)
    mean, log_variance = G.encode(torch.rand(2, 3, resolution, resolution) * 2 - 1)
    assert mean.shape == log_variance.shape == (2, 6)
    images = G(100 * torch.randn(2, 6))
    assert images.shape == (2, 3, resolution, resolution)
    assert 0.1 < images.abs().max() <= 1


@pytest.mark.parametrize("resolution", [0, 8, 48, 512])
def test_another_resolution_is_refused(resolution):
    with pytest.raises(ValueError, match=str(resolution)):
        small(resolution)


def test_channels_double_down_to_four_pixels_and_at_most_eightfold():
    G = small(256)
    strided = [m for m in G.down.modules() if isinstance(m, nn.Conv2d) and m.stride == (2, 2)]
    assert [conv.out_channels for conv in strided] == [8, 16, 32, 64, 64, 64]
    assert [block.conv1[0].out_channels for block in G.up] == [64, 64, 32, 16, 8, 8]
    assert not any(isinstance(m, nn.ConvTranspose2d) for m in G.modules())


def test_every_parameter_gets_a_gradient():
    G = small()
    mean, log_variance = G.encode(torch.randn(2, 3, 16, 16))
    G(mean + log_variance).square().sum().backward()
    assert [name for name, p in G.named_parameters() if not p.grad.abs().sum()] == []


def test_a_image_does_not_depend_on_the_rest_of_the_batch():
    G, z, x = small(32).double(), torch.randn(4, 6).double(), torch.randn(4, 3, 32, 32).double()
    for training in (True, False):
        G.train(training)
        torch.testing.assert_close(G(z)[1:2], G(z[1:2]))
        for whole, alone in zip(G.encode(x), G.encode(x[1:2]), strict=True):
            torch.testing.assert_close(whole[1:2], alone)


def test_posteriors_begin_near_the_prior_and_images_near_grey():
    G = small(64)
    mean, log_variance = G.encode(torch.rand(8, 3, 64, 64) * 2 - 1)
    assert mean.abs().max() < 1 and log_variance.abs().max() < 1
    assert G(torch.randn(8, 6)).abs().mean() < 0.2


def test_under_autocast_posteriors_and_images_are_float32():
    G = small()
    with torch.autocast("cpu", torch.bfloat16):
        mean, log_variance = G.encode(torch.randn(2, 3, 16, 16))
        assert {x.dtype for x in (mean, log_variance, G(mean))} == {torch.float32}
