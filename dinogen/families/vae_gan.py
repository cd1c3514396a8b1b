"""Family `vae_gan`: a variational autoencoder with a PatchGAN discriminator."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from dinogen.batch import Batch, Losses
from dinogen.config import Config, ConfigError, StageConfig
from dinogen.families.base import Phase, judged_alone
from dinogen.families.gan import layers_of
from dinogen.families.vae import Vae
from dinogen.losses.adversarial import hinge_d, hinge_g
from dinogen.networks.patchgan import PatchDiscriminator, num_patches


class VaeGan(Vae):
    """Squared error, KL and the hinge loss against a PatchGAN D.

    After Larsen et al. 2016, "Autoencoding beyond pixels using a learned similarity metric". For
    one image x of n = 3 * R * R values the loss of G is

        sum (x - decode(z))^2 / n + beta KL(q || N(0, 1)) + lambda_adv hinge + lambda perceptual

    Unlike in :class:`Vae` the KL, summed over the latent, is *not* divided by n, and the squared
    error is not halved: beta 1e-4 is 1e-4 * n / 2 of the ELBO's beta, 0.6 at 64x64. With
    the VAE's scaling, 1e-4 would leave the posterior far from the prior (on toy images the KL
    exceeded 600 nats), so that samples of the prior would be meaningless.

    D sees reconstructions and as many decoded samples of the prior (their section 2.3): the prior
    is what is sampled in the end, and reconstructions teach nothing where no posterior lies.
    Held-out values leave the adversarial term out, as D is not averaged.
    """

    class Options(Vae.Options):
        """Keys of ``family:`` for ``name: vae_gan``."""

        beta: float = Field(
            1e-4,
            ge=0,
            description="weight of the KL in nats, relative to the mean squared error per value",
        )
        lambda_adv: float = Field(0.1, ge=0, description="weight of the adversarial loss of G")
        d_layers: int = Field(
            3, ge=1, le=5, description="D's halvings: 1, 2, 3 give patches of 16, 34, 70 pixels"
        )
        d_channels: int = Field(
            64, ge=8, multiple_of=8, description="D's channels behind its first layer"
        )

    options: Options

    def __init__(self, config: Config, stage: StageConfig, device: torch.device) -> None:
        super().__init__(config, stage, device)
        if num_patches(stage.resolution, self.options.d_layers) < 1:
            raise ConfigError(
                f"family.d_layers: {self.options.d_layers} halvings leave nothing of "
                f"{stage.resolution}x{stage.resolution} pixels for D: use fewer"
            )
        self.mse_weight, self.kl_weight = 1.0, self.options.beta
        self.D = PatchDiscriminator(**self.arguments("D")).to(device)

    @property
    def networks(self) -> dict[str, nn.Module]:
        """The autoencoder G and the discriminator D."""
        return {"G": self.G, "D": self.D}

    @property
    def phases(self) -> tuple[Phase, ...]:
        """One update of D, then one of G."""
        return (Phase("D", "D", self._d_losses), Phase("G", "G", self._losses))

    def realism(self, images: Tensor) -> Tensor:
        """D's mean logit over all patches."""
        return judged_alone(self.D, images)

    def layers(self, network: str) -> list[set[str]]:
        """D's, up to the one before its logits."""
        return layers_of(self.D) if network == "D" else []

    def arguments(self, network: str) -> dict[str, Any]:
        """Of G or D."""
        if network == "D":
            return {"num_layers": self.options.d_layers, "base_channels": self.options.d_channels}
        return super().arguments(network)

    def _d_losses(self, batch: Batch) -> Losses:
        reconstructions, _ = self._reconstruct(self.G, batch, "z/D")
        real, fake = (
            self.D(batch["image"]),
            self._logits_of_fakes(reconstructions, batch, "prior/D"),
        )
        report = {"real": real.detach().mean(), "fake": fake.detach().mean()}
        return {"hinge": hinge_d(real, fake)}, report

    def _losses(self, batch: Batch) -> Losses:
        reconstructions, kl = self._reconstruct(self.G, batch, "z/G")
        losses, report = self._logits(reconstructions, kl, batch["image"])
        fake = self._logits_of_fakes(reconstructions, batch, "prior/G")
        return losses | {"adversarial": self.options.lambda_adv * hinge_g(fake)}, report

    def _logits_of_fakes(self, reconstructions: Tensor, batch: Batch, purpose: str) -> Tensor:
        """Logits of the reconstructions, and of as many decoded samples of the prior."""
        prior = self.G(self._noise(purpose, batch["position"], self.config.seed))
        logits: Tensor = self.D(torch.cat([reconstructions, prior]))
        return logits
