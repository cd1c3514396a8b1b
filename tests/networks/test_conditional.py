"""The conditional generator: who sees the embedding, guidance, growth as without conditions."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from dinogen.config import ConfigError
from dinogen.networks.progressive import (
    ConditionalGenerator,
    ConditionalMapping,
    ProgressiveGenerator,
)
from dinogen.training.checkpointing.transfer import grow

Z, E = 12, 7


def generator(resolution, seed=0, **more):
    torch.manual_seed(seed)
    return ConditionalGenerator(resolution, E, z_dim=Z, channel_base=128, channel_max=16, **more)


def draws(num=5, seed=0):
    torch.manual_seed(seed)
    return torch.randn(num, Z), torch.randn(num, E)


def test_the_mapping_by_hand():
    torch.manual_seed(0)
    mapping = ConditionalMapping(Z, E, num_layers=2)
    z, embedding = draws()
    keep = torch.tensor([True, False, True, True, False])

    def unit(x):
        return x / (x.square().mean() + 1e-8).sqrt()

    for row in range(5):
        condition = mapping.embed.weight @ unit(embedding[row]) / E**0.5 + mapping.embed.bias
        x = torch.cat([unit(z[row]), unit(condition if keep[row] else mapping.null)])
        first, last = mapping.layers
        x = first.weight @ x / (2 * Z) ** 0.5 + first.bias
        x = torch.where(x > 0, x, 0.2 * x) * 2**0.5
        x = last.weight @ x / Z**0.5 + last.bias
        torch.testing.assert_close(mapping(z, embedding, keep)[row], x)


def test_the_latent_is_spread_as_z_is():
    torch.manual_seed(0)
    mapping = ConditionalMapping(256, 64, num_layers=2)
    latent = mapping(torch.randn(500, 256), torch.randn(500, 64))
    assert latent.square().mean().item() == pytest.approx(1, abs=0.2)
    assert latent.mean().item() == pytest.approx(0, abs=0.1)


def test_whom_the_embedding_is_kept_from_does_not_depend_on_it():
    G = generator(8)
    z, embedding = draws()
    keep = torch.tensor([True, False, True, False, False])
    images = G(z, embedding, keep)
    assert images.shape == (5, 3, 8, 8) and images.abs().max() <= 1
    other = G(z, -embedding, keep)
    changed = (images != other).flatten(1).any(1)
    assert changed.tolist() == keep.tolist()
    torch.testing.assert_close(images[~keep], G(z)[~keep])
    torch.testing.assert_close(images[keep], G(z, embedding)[keep])
    torch.testing.assert_close(images, G(z, 9 * embedding, keep))  # its length means nothing
    assert not torch.allclose(G(z, embedding), G(z.flip(0), embedding), atol=1e-3)


def test_guidance_extrapolates_latents_from_none_to_the_condition():
    G = generator(8)
    z, embedding = draws()
    null, asked = G.latents(z), G.latents(z, embedding)
    assert torch.equal(G.latents(z, embedding, guidance=1), asked)
    torch.testing.assert_close(G.latents(z, embedding, guidance=0), null)
    for s in (0.5, 2.0, 4.0):
        torch.testing.assert_close(G.latents(z, embedding, guidance=s), null + s * (asked - null))
    keep = torch.tensor([True, False, True, False, True])
    guided = G.latents(z, embedding, keep, guidance=3.0)
    torch.testing.assert_close(guided[~keep], null[~keep])
    torch.testing.assert_close(guided[keep], (null + 3 * (asked - null))[keep])
    assert torch.equal(G.latents(z, guidance=3.0), null)
    drawn = ProgressiveGenerator.forward(G, G.latents(z, embedding, guidance=2.0))
    assert torch.equal(G(z, embedding, guidance=2.0), drawn)


@pytest.mark.parametrize("asked", ["some", "all", "none"])
def test_every_parameter_in_use_gets_a_gradient_regardless_of_dropout(asked):
    G = generator(16)
    z, embedding = draws()
    keep = {"some": torch.arange(5) < 2, "all": torch.ones(5, dtype=torch.bool), "none": None}
    args = (z,) if asked == "none" else (z, embedding, keep[asked])
    G(*args).square().sum().backward()
    without = {name for name, parameter in G.named_parameters() if parameter.grad is None}
    assert without == G.old_to_rgb() == {"to_rgb.8.weight", "to_rgb.8.bias"}


def test_it_grows_and_fades_as_the_one_without_conditions():
    before, grown = generator(8), generator(16, seed=1)
    plain = ProgressiveGenerator(16, z_dim=Z, channel_base=128, channel_max=16)
    assert grown.new_parameters() == plain.new_parameters()
    assert grown.old_to_rgb() == plain.old_to_rgb()
    grow(grown, before.state_dict(), grown.new_parameters(), ConfigError)
    grown.set_fade(0.0, fading=True)
    assert grown.fading
    z, embedding = draws()
    expected = F.interpolate(before(z, embedding), scale_factor=2, mode="nearest")
    assert torch.equal(grown(z, embedding), expected)
    assert isinstance(grown, ProgressiveGenerator)
    assert grown.dense.weight.shape[1] == Z


def test_under_autocast_the_mapping_stays_in_float32():
    G = generator(8)
    z, embedding = draws()
    plain = G.latents(z, embedding)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(G.latents(z, embedding), plain)
        assert G(z, embedding).dtype == torch.float32
