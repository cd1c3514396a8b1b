"""DCGAN's networks: shapes, ranges, the paper's sizes and initialisation."""

import pytest
import torch
from torch import nn

from dinogen.networks.dcgan import RESOLUTIONS, DcganDiscriminator, DcganGenerator


def num_parameters(network):
    return sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize("resolution", RESOLUTIONS)
def test_images_and_logits_have_their_shapes(resolution):
    G, D = DcganGenerator(resolution, z_dim=7, ngf=4), DcganDiscriminator(resolution, ndf=4)
    images = G(10 * torch.randn(2, 7))
    assert images.shape == (2, 3, resolution, resolution)
    assert images.dtype == torch.float32 and images.abs().max() <= 1
    assert D(images).shape == (2,)


@pytest.mark.parametrize("resolution", [4, 8, 48, 256])
def test_other_resolutions_are_refused(resolution):
    with pytest.raises(ValueError, match=str(resolution)):
        DcganGenerator(resolution)
    with pytest.raises(ValueError, match=str(resolution)):
        DcganDiscriminator(resolution)


def test_at_64_they_are_as_large_as_torch_s_example():
    # github.com/pytorch/examples, dcgan: nz 100, ngf and ndf 64
    assert num_parameters(DcganGenerator(64)) == 3_576_704
    assert num_parameters(DcganDiscriminator(64)) == 2_765_568


def test_channels_halve_as_the_size_doubles():
    G = DcganGenerator(64, ngf=8)
    widths = [m.out_channels for m in G.modules() if isinstance(m, nn.ConvTranspose2d)]
    assert widths == [64, 32, 16, 8, 3]
    D = DcganDiscriminator(64, ndf=8)
    assert [m.out_channels for m in D.modules() if isinstance(m, nn.Conv2d)] == [8, 16, 32, 64, 1]


def test_weights_begin_as_the_paper_says():
    torch.manual_seed(0)
    for network in (DcganGenerator(32), DcganDiscriminator(32)):
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                assert module.weight.mean().item() == pytest.approx(1, abs=0.01)
                assert module.weight.std().item() == pytest.approx(0.02, rel=0.3)
                assert module.bias.abs().max() == 0
            elif isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
                assert module.weight.mean().item() == pytest.approx(0, abs=0.002)
                assert module.weight.std().item() == pytest.approx(0.02, rel=0.1)
                assert module.bias is None


def test_in_eval_mode_a_image_is_its_own_matter():
    torch.manual_seed(0)
    G, z = DcganGenerator(16, z_dim=7, ngf=4), torch.randn(6, 7)
    together = G(z)
    assert not torch.allclose(G(z[:2]), together[:2], atol=1e-3)
    G.eval()
    torch.testing.assert_close(G(z[:2]), G(z)[:2])
