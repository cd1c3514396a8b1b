"""The convolutional VAE's network: shapes, range, and that images do not meet in a batch."""

import pytest
import torch
from torch import nn

from dinogen.networks.autoencoder import Autoencoder


def small(resolution=16, latent=6, latent_side=0):
    torch.manual_seed(0)
    return Autoencoder(resolution, latent, base_channels=8, latent_side=latent_side)


@pytest.mark.parametrize("resolution", [16, 32, 64, 128, 256])
def test_shapes_and_range(resolution):
    G = small(resolution)
    mean, log_variance = G.encode(torch.rand(2, 3, resolution, resolution) * 2 - 1)
    assert mean.shape == log_variance.shape == (2, 6)
    images = G(100 * torch.randn(2, 6))
    assert images.shape == (2, 3, resolution, resolution)
    assert 0.1 < images.abs().max() <= 1


@pytest.mark.parametrize(
    ("resolution", "side"), [(16, 4), (16, 8), (32, 8), (64, 4), (64, 16), (256, 32)]
)
def test_shapes_of_a_spatial_latent(resolution, side):
    G = small(resolution, latent_side=side)
    assert G.shape == (6, side, side) and small(resolution).shape == (6,)
    mean, log_variance = G.encode(torch.rand(2, 3, resolution, resolution) * 2 - 1)
    assert mean.shape == log_variance.shape == (2, 6, side, side)
    images = G(100 * torch.randn(2, 6, side, side))
    assert images.shape == (2, 3, resolution, resolution) and images.abs().max() <= 1


@pytest.mark.parametrize("side", [1, 2, 6, 16, 32])
def test_another_side_is_refused(side):
    with pytest.raises(ValueError, match=f"latent_side {side} is not a power of two from 4"):
        small(16, latent_side=side)


def test_a_spatial_latent_moves_with_the_image():
    """Moved by the pixels of one location, an image has its latent moved by one location."""
    G = small(64, latent_side=16).double()
    for norm in (one for one in G.modules() if isinstance(one, nn.GroupNorm)):
        norm.normalized = lambda x, weight, bias: x  # it sees the whole image
    image = torch.zeros(1, 3, 64, 64).double()
    image[..., 28:36, 24:40] = torch.rand(3, 8, 16).double()
    mean, moved = (G.encode(one)[0] for one in (image, image.roll((4, 8), (2, 3))))
    assert mean.std() > 1e-3
    torch.testing.assert_close(moved, mean.roll((1, 2), (2, 3)))
    shown, other = (G.decode(one.double()) for one in (mean, mean.roll((1, 2), (2, 3))))
    inner = (..., slice(24, 48), slice(24, 48))
    torch.testing.assert_close(other[inner], shown.roll((4, 8), (2, 3))[inner])


def test_weights_of_a_spatial_latent_fit_every_resolution():
    G = small(32, latent_side=8)
    small(64, latent_side=16).load_state_dict(G.state_dict())


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


@pytest.mark.parametrize("side", [0, 4])
def test_every_parameter_gets_a_gradient(side):
    G = small(latent_side=side)
    mean, log_variance = G.encode(torch.randn(2, 3, 16, 16))
    G(mean + log_variance).square().sum().backward()
    assert [name for name, p in G.named_parameters() if not p.grad.abs().sum()] == []


@pytest.mark.parametrize("side", [0, 8])
def test_a_image_does_not_depend_on_the_rest_of_the_batch(side):
    G, x = small(32, latent_side=side).double(), torch.randn(4, 3, 32, 32).double()
    z = torch.randn(4, *G.shape).double()
    for training in (True, False):
        G.train(training)
        torch.testing.assert_close(G(z)[1:2], G(z[1:2]))
        for whole, alone in zip(G.encode(x), G.encode(x[1:2]), strict=True):
            torch.testing.assert_close(whole[1:2], alone)


@pytest.mark.parametrize("side", [0, 8])
def test_posteriors_begin_near_the_prior_and_images_near_grey(side):
    G = small(64, latent_side=side)
    mean, log_variance = G.encode(torch.rand(8, 3, 64, 64) * 2 - 1)
    assert mean.abs().max() < 1 and log_variance.abs().max() < 1
    assert G(torch.randn(8, *G.shape)).abs().mean() < 0.2


@pytest.mark.parametrize("side", [0, 8])
def test_under_autocast_posteriors_and_images_are_float32(side):
    G = small(latent_side=side)
    with torch.autocast("cpu", torch.bfloat16):
        mean, log_variance = G.encode(torch.randn(2, 3, 16, 16))
        assert {x.dtype for x in (mean, log_variance, G(mean))} == {torch.float32}
