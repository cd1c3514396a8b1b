"""Family `vae`: a convolutional variational autoencoder, optionally with a perceptual term."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from dinogen.batch import Batch, Losses, Scalars
from dinogen.config import Config, ConfigError, Section, StageConfig
from dinogen.distributed import rng
from dinogen.families.base import Family, Inputs, Networks, Phase
from dinogen.features.vgg import VggFeatures, load_vgg
from dinogen.losses.features import (
    kl_to_standard_normal,
    perceptual_distance,
    psnr,
    reparameterize,
    squared_error,
)
from dinogen.networks.autoencoder import Autoencoder, latent_sides
from shards.read.dataset import Dataset


class Vae(Family):
    """The evidence lower bound of Kingma and Welling 2014 (equation 10), per pixel value.

    For one image x of n = 3 * R * R values, with z drawn from its posterior q, the loss is

        ( 1/2 sum (x - decode(z))^2 + beta KL(q || N(0, 1)) ) / n + lambda perceptual

    The squared error is summed over pixels and channels, the KL over the latent, in nats; both are
    divided by the same n. So beta 1 is the bound of a Gaussian decoder of unit variance (in units
    of images in [-1, 1]), at every resolution, and any other beta that of Higgins et al. 2017.
    The perceptual distance (:func:`dinogen.losses.features.perceptual_distance`) is a mean
    per feature map, summed over three. All terms are averaged over the batch.

    With ``latent_side`` s the latent is a map (latent, s, s), for `prepare.latents`, and its KL is
    summed over all its values. Beta is then small: the family that is trained on the latents learns
    their distribution, so the prior only has to keep their scale. Rombach et al. 2022 weigh the KL
    by 1e-6, relative to a sum of absolute errors, which is about a beta of 1e-6 here. At 1e-3 a
    posterior is still a twentieth as wide as the latents are spread, and images of drawn latents
    lose 0.1 dB (vae_latent_fast).
    """

    class Options(Section):
        """Keys of ``family:`` for ``name: vae``."""

        latent: int = Field(
            256, ge=1, description="size of the latent; with latent_side, its channels"
        )
        latent_side: int = Field(
            0,
            ge=0,
            description="side of a spatial latent for prepare.latents, a power of two from 4 to "
            "half the resolution; 0: the latent is a vector",
        )
        base_channels: int = Field(
            64,
            ge=8,
            multiple_of=8,
            description="channels at half the resolution; doubled down to 4x4 or latent_side, "
            "to 8 times",
        )
        beta: float = Field(
            1.0, ge=0, description="weight of the KL; 1 is the ELBO of a unit-variance decoder"
        )
        lambda_perceptual: float = Field(
            0.0, ge=0, description="weight of the distance of VGG-16 features; 0 needs no VGG"
        )
        perceptual_weights: str = Field(
            "vgg16",
            min_length=1,
            description="of VGG-16: vgg16 (downloaded), a .safetensors or .pth file, or random",
        )

    options: Options

    def __init__(self, config: Config, stage: StageConfig, device: torch.device) -> None:
        super().__init__(config, stage, device)
        self.options = self.Options(**config.family.options)
        if not 16 <= stage.resolution <= 256:
            raise ConfigError(
                f"stages: a VAE has no resolution {stage.resolution}: use 16, 32, 64, 128 or 256"
            )
        sides = latent_sides(stage.resolution)
        if self.options.latent_side not in (0, *sides):
            raise ConfigError(
                f"family.latent_side: {self.options.latent_side}: at resolution "
                f"{stage.resolution} it can be {', '.join(map(str, sides))}, or 0 for a vector"
            )
        self.G = Autoencoder(**self.arguments("G")).to(device)
        num_values = 3 * stage.resolution**2
        self.mse_weight, self.kl_weight = 0.5, self.options.beta / num_values

    @property
    def networks(self) -> dict[str, nn.Module]:
        """Encoder and decoder as one, G."""
        return {"G": self.G}

    @property
    def phases(self) -> tuple[Phase, ...]:
        """One update of G."""
        return (Phase("G", "G", self._losses),)

    @property
    def inputs(self) -> Inputs:
        """Images."""
        return Inputs(image_size=self.stage.resolution)

    @cached_property
    def vgg(self) -> VggFeatures | None:
        """VGG-16, if the loss uses it; loaded on first use.

        Raises:
            ConfigError: its weights cannot be loaded.
        """
        if not self.options.lambda_perceptual:
            return None
        return load_vgg(self.options.perceptual_weights, self.device, "family.perceptual_weights")

    @property
    def frozen(self) -> tuple[nn.Module, ...]:
        """VGG-16, if the loss uses it."""
        return () if self.vgg is None else (self.vgg,)

    def begin(self, data: Dataset) -> None:
        """Load VGG-16 before the first step, if the loss uses it."""
        _ = self.vgg

    def latents(self, indices: Tensor, seed: int) -> Tensor:
        """Samples of the prior (N, latent), or (N, latent, s, s)."""
        return self._noise("sample", indices, seed)

    def reconstruct(self, networks: Networks, batch: Batch) -> Tensor:
        """The decoded means of the posteriors."""
        G = networks["G"]
        assert isinstance(G, Autoencoder)
        mean, _ = G.encode(batch["image"])
        return G.decode(mean)

    inverts_by = "the mean of the encoder's posterior"
    refines = True

    def invert(self, networks: Networks, images: Tensor, indices: Tensor) -> Tensor:
        """The means of the posteriors."""
        G = networks["G"]
        assert isinstance(G, Autoencoder)
        return G.encode(images)[0]

    def first_layer(self, networks: Networks) -> Tensor | None:
        """The decoder's dense layer to 4x4; a spatial latent has none."""
        G = networks["G"]
        assert isinstance(G, Autoencoder)
        return None if G.latent_side else G.from_latent.weight.detach()

    def arguments(self, network: str) -> dict[str, Any]:
        """Of G."""
        found = {
            "resolution": self.stage.resolution,
            "latent": self.options.latent,
            "base_channels": self.options.base_channels,
        }
        if self.options.latent_side:  # absent in exports of earlier versions
            found["latent_side"] = self.options.latent_side
        return found

    def held_out(self, networks: Networks, batch: Batch) -> Scalars:
        """The loss on images that were not trained on, its terms, and the PSNR in dB."""
        reconstructions, kl = self._reconstruct(networks["G"], batch, "z/held-out")
        losses, report = self._logits(reconstructions, kl, batch["image"])
        return {"loss": torch.stack(list(losses.values())).sum(), **report}

    def describe(self) -> dict[str, Any]:
        """Which VGG the loss uses, if any, and whether its weights are random."""
        if self.vgg is None:
            return {}
        info = self.vgg.info
        return {"guide": info.to_dict(), "guide_label": info.label, "random_guide": info.random}

    def _noise(self, purpose: str, positions: Tensor, seed: int) -> Tensor:
        return rng.normal(seed, purpose, positions, self.G.shape, self.device)

    def _losses(self, batch: Batch) -> Losses:
        return self._logits(*self._reconstruct(self.G, batch, "z"), batch["image"])

    def _reconstruct(self, G: nn.Module, batch: Batch, purpose: str) -> tuple[Tensor, Tensor]:
        """Decoded samples of the posteriors (B, 3, R, R), and each posterior's KL (B,)."""
        assert isinstance(G, Autoencoder)
        mean, log_variance = G.encode(batch["image"])
        noise = self._noise(purpose, batch["position"], self.config.seed)
        kl = kl_to_standard_normal(mean, log_variance)
        return G(reparameterize(mean, log_variance, noise)), kl

    def _logits(self, reconstructions: Tensor, kl: Tensor, images: Tensor) -> Losses:
        """The terms of the loss, and their values in plain units."""
        mse = squared_error(reconstructions, images) / images[0].numel()
        losses = {
            "reconstruction": self.mse_weight * mse.mean(),
            "kl": self.kl_weight * kl.mean(),
        }
        if self.vgg is not None:
            distance = perceptual_distance(self.vgg(reconstructions), self.vgg(images))
            losses["perceptual"] = self.options.lambda_perceptual * distance.mean()
        mse, kl = mse.detach(), kl.detach()
        return losses, {"mse": mse.mean(), "kl_nats": kl.mean(), "psnr": psnr(mse).mean()}
