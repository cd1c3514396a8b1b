"""A conditional generator: z and an embedding are mapped to its latent."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dinogen.networks.progressive import ProgressiveGenerator
from dinogen.networks.stylegan2.layers import Dense, normalize


class ConditionalMapping(nn.Module):
    """z and an embedding, or a learned vector in place of none, to a latent of z's size.

    Both are brought to mean square 1 and joined, as z and the label's embedding are in StyleGAN2's
    mapping (Karras et al. 2020, "Training Generative Adversarial Networks with Limited Data",
    appendix), then put through dense layers with equalised learning rate. The last one is linear,
    so that the latent is spread about zero at mean square 1, as a generator without conditions
    finds its z. Always in float32.

    Args:
        z_dim: size of z, and of the latent.
        embed_dim: size of the embedding.
        num_layers: dense layers behind the join.
    """

    def __init__(self, z_dim: int, embed_dim: int, num_layers: int = 2) -> None:
        super().__init__()
        self.embed_dim = embed_dim
        self.embed = Dense(embed_dim, z_dim)
        self.null = nn.Parameter(torch.randn(z_dim))
        sizes = [2 * z_dim] + [z_dim] * num_layers
        self.layers = nn.ModuleList(
            Dense(sizes[i], sizes[i + 1], active=i + 1 < num_layers) for i in range(num_layers)
        )

    def forward(
        self, z: Tensor, embedding: Tensor | None = None, keep: Tensor | None = None
    ) -> Tensor:
        """z (B, z_dim) standard normal -> latent (B, z_dim) float32.

        Args:
            z: latents.
            embedding: (B, embed_dim), of any length but zero; None for no condition at all.
            keep: (B,) bool: False for samples that the embedding is kept from (classifier-free
                dropout: Ho and Salimans 2022, "Classifier-Free Diffusion Guidance", algorithm 1);
                None keeps all, and leaves the learned vector without a gradient.
        """
        if embedding is None:
            # Not left out: every parameter must have a gradient, also where all were dropped.
            embedding = z.new_zeros(len(z), self.embed_dim)
            keep = torch.zeros(len(z), dtype=torch.bool, device=z.device)
        condition = self.embed(normalize(embedding.float()))
        if keep is not None:
            condition = torch.where(keep[:, None], condition, self.null)
        x = torch.cat([normalize(z.float()), normalize(condition)], 1)
        for layer in self.layers:
            x = layer(x)
        return x


class ConditionalGenerator(ProgressiveGenerator):
    """The progressive generator behind a mapping of z and an embedding.

    It grows and fades as the one without: the mapping has the same shape at every resolution, so a
    stage takes it over whole.

    Args:
        resolution: side of the images, a power of two from 4.
        embed_dim: size of the embedding.
        z_dim: size of the latent.
        channel_base: channels at resolution R are ``channel_base / R``, at most ``channel_max``.
        channel_max: most channels at any resolution.
        num_mapping_layers: dense layers of the mapping.
    """

    def __init__(
        self,
        resolution: int,
        embed_dim: int,
        z_dim: int = 512,
        channel_base: int = 16384,
        channel_max: int = 512,
        num_mapping_layers: int = 2,
    ) -> None:
        super().__init__(resolution, z_dim, channel_base, channel_max)
        self.mapping = ConditionalMapping(z_dim, embed_dim, num_mapping_layers)

    def latents(
        self,
        z: Tensor,
        embedding: Tensor | None = None,
        keep: Tensor | None = None,
        guidance: float = 1.0,
    ) -> Tensor:
        """The latents of the images: w_null + guidance (w_condition - w_null).

        Classifier-free guidance (Ho and Salimans 2022, equation 6, guidance = 1 + its w) on the
        latent in place of the score. 1 is the condition as it is, 0 none, more exaggerates it.

        Returns:
            (B, z_dim) float32.
        """
        w: Tensor = self.mapping(z, embedding, keep)
        if embedding is None or guidance == 1:
            return w
        return torch.lerp(self.mapping(z), w, guidance)

    def forward(
        self,
        z: Tensor,
        embedding: Tensor | None = None,
        keep: Tensor | None = None,
        guidance: float = 1.0,
    ) -> Tensor:
        """Latents (B, z_dim) and embeddings -> images (B, 3, R, R) in [-1, 1].

        Args:
            z: standard normal.
            embedding: (B, embed_dim), of any length but zero; None for images of no condition.
            keep: (B,) bool, see :class:`ConditionalMapping`.
            guidance: see :meth:`latents`.
        """
        return super().forward(self.latents(z, embedding, keep, guidance))
