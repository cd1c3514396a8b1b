"""Progressive growing: generator and discriminator, each block faded in; learned latents."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dinogen.networks.casts import cast_together, conv
from dinogen.networks.layers import leaky_relu, minibatch_std, nearest_conv
from dinogen.networks.stylegan2.layers import Dense, normalize

LEAK = 0.2
# Images begin near grey: noise of full contrast drives tanh flat before the mean is learnt.
TO_RGB_GAIN = 0.1


class UpBlock(nn.Module):
    """Nearest upsample, then two 3x3 convolutions with LeakyReLU."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv0 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.conv1 = nn.Conv2d(out_channels, out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, I, R, R) -> (B, O, 2R, 2R)."""
        x = F.leaky_relu(nearest_conv(x, self.conv0.weight, self.conv0.bias), LEAK)
        return F.leaky_relu(self.conv1(x), LEAK)


class ProgressiveGenerator(nn.Module):
    """z -> dense to 4x4 -> blocks up to ``resolution`` -> 1x1 ToRGB -> tanh.

    Built only up to its resolution. It holds the ToRGB of that resolution and of the one before,
    which is the other end of the fade-in. ``alpha`` is a buffer, so a snapshot taken in the midst
    of a fade-in gives the images that training saw.

    Args:
        resolution: side of the images, a power of two from 4.
        z_dim: size of the latent.
        channel_base: channels at resolution R are ``channel_base / R``, at most ``channel_max``.
        channel_max: most channels at any resolution.
        num_latents: rows of ``table``: one learnt latent per training image; there is
            no table if 0.
        latent_rate: see :class:`LatentTable`.
    """

    alpha: Tensor

    def __init__(
        self,
        resolution: int,
        z_dim: int = 512,
        channel_base: int = 16384,
        channel_max: int = 512,
        num_latents: int = 0,
        latent_rate: float = 10.0,
    ) -> None:
        super().__init__()
        if resolution < 4 or resolution & (resolution - 1):
            raise ValueError(f"resolution {resolution} is not a power of two from 4")
        self.resolution = resolution
        self.z_dim = z_dim
        sizes = [4 << i for i in range((resolution // 4).bit_length())]
        channels = {size: max(1, min(channel_max, channel_base // size)) for size in sizes}
        self.dense = nn.Linear(z_dim, channels[4] * 16)
        self.blocks = nn.ModuleDict(
            {str(size): UpBlock(channels[size // 2], channels[size]) for size in sizes[1:]}
        )
        self.to_rgb = nn.ModuleDict(
            {str(size): nn.Conv2d(channels[size], 3, 1) for size in sizes[-2:]}
        )
        self.register_buffer("alpha", torch.ones(()))
        self.fading = False
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif name.startswith("to_rgb"):
                nn.init.xavier_normal_(parameter, TO_RGB_GAIN)
            else:
                nn.init.kaiming_normal_(parameter, a=LEAK)
        self.table = LatentTable(num_latents, z_dim, latent_rate) if num_latents else None

    def new_parameters(self) -> set[str]:
        """Names of the parameters that this resolution adds: its block and its ToRGB."""
        prefixes = (f"blocks.{self.resolution}.", f"to_rgb.{self.resolution}.")
        return {name for name, _ in self.named_parameters() if name.startswith(prefixes)}

    def old_to_rgb(self) -> set[str]:
        """Names of the parameters of the ToRGB before, which is used only while fading in."""
        prefix = f"to_rgb.{self.resolution // 2}."
        return {name for name, _ in self.named_parameters() if name.startswith(prefix)}

    def set_fade(self, alpha: float, fading: bool) -> None:
        """Set the share of the new block in the image (0 to 1), and whether it is fading in."""
        self.fading = fading
        self.alpha.fill_(alpha)

    def forward(self, z: Tensor) -> Tensor:
        """Latents (B, z_dim) -> images (B, 3, R, R) in [-1, 1]."""
        x = F.linear(z, *cast_together(self.dense)[0]).unflatten(1, (-1, 4, 4))
        x = F.leaky_relu(x, LEAK)
        before = x
        for block in self.blocks.values():
            before, x = x, block(x)
        rgb = _convolved(self.to_rgb[str(self.resolution)], x).float()
        if self.fading:
            old = _convolved(self.to_rgb[str(self.resolution // 2)], before)
            # float32 by hand: CUDA's autocast upsamples in float32, and lerp takes no two types.
            old = F.interpolate(old.float(), scale_factor=2, mode="nearest")
            # Blended before tanh: while alpha is small the new block overshoots, and an image of
            # its own would be driven to where tanh is flat and nothing is learned any more.
            rgb = torch.lerp(old, rgb, self.alpha)
        return torch.tanh(rgb)


# A direction in which all rows agree would be blown up without end.
_LEAST_DEVIATION = 1e-3


class LatentTable(nn.Module):
    """Rows u; the latent of row i is L^-1 (u_i - mean), with L L' the covariance of all rows.

    Mean and L count as constants in the gradient. Their size means nothing then, only how fast
    rows move for it: with Adam, whose steps have the size of the learning rate, rows of deviation
    1 / ``rate`` move ``rate`` times as fast as weights of size 1.

    Args:
        num_latents: rows, more than ``z_dim``.
        z_dim: size of a latent.
        rate: of learning, over that of the other parameters.
    """

    def __init__(self, num_latents: int, z_dim: int, rate: float = 10.0) -> None:
        super().__init__()
        if num_latents <= z_dim:
            raise ValueError(
                f"{num_latents} latents of {z_dim} numbers: a Gaussian in {z_dim} dimensions needs "
                "more points than that"
            )
        self.least = _LEAST_DEVIATION / rate
        self.rows = nn.Parameter(torch.randn(num_latents, z_dim) / rate)

    def forward(self, numbers: Tensor) -> Tensor:
        """Latents (B, z_dim) float32 of rows ``numbers`` (B,); all: mean 0, covariance 1."""
        with torch.autocast(self.rows.device.type, enabled=False):
            rows = self.rows.float()
            with torch.no_grad():
                mean = rows.mean(0)
                covariance = (rows - mean).T @ (rows - mean) / len(rows)
                covariance.diagonal().add_(self.least**2)
                L = torch.linalg.cholesky(covariance)
            # Looked up by embedding: its gradient is summed in one order on a GPU as well.
            own = nn.functional.embedding(numbers, rows) - mean
            z: Tensor = torch.linalg.solve_triangular(L, own.T, upper=False).T
            return z


class DownBlock(nn.Module):
    """Two 3x3 convolutions with LeakyReLU, then 2x2 means."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv0 = nn.Conv2d(in_channels, in_channels, 3, padding=1)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, I, R, R) -> (B, O, R/2, R/2)."""
        own = cast_together(self.conv0, self.conv1)
        for layer, weights in zip((self.conv0, self.conv1), own, strict=True):
            x = leaky_relu(conv(layer, x, weights), LEAK)
        return F.avg_pool2d(x, 2)


class ProgressiveDiscriminator(nn.Module):
    """1x1 FromRGB -> blocks down to 4x4 -> minibatch std, 3x3, dense, dense.

    Built only from its resolution down. It holds the FromRGB of that resolution and of the one
    before, which is the other end of the fade-in.

    Args:
        resolution: side of the images, a power of two from 4.
        channel_base: channels at resolution R are ``channel_base / R``, at most ``channel_max``.
        channel_max: most channels at any resolution.
        group_size: samples over which the minibatch standard deviation is taken.
    """

    alpha: Tensor

    def __init__(
        self,
        resolution: int,
        channel_base: int = 16384,
        channel_max: int = 512,
        group_size: int = 4,
    ) -> None:
        super().__init__()
        if resolution < 4 or resolution & (resolution - 1):
            raise ValueError(f"resolution {resolution} is not a power of two from 4")
        self.resolution = resolution
        self.group_size = group_size
        sizes = [4 << i for i in reversed(range((resolution // 4).bit_length()))]
        channels = {size: max(1, min(channel_max, channel_base // size)) for size in sizes}
        self.from_rgb = nn.ModuleDict(
            {str(size): nn.Conv2d(3, channels[size], 1) for size in sizes[:2]}
        )
        self.blocks = nn.ModuleDict(
            {str(size): DownBlock(channels[size], channels[size // 2]) for size in sizes[:-1]}
        )
        self.conv = nn.Conv2d(channels[4] + 1, channels[4], 3, padding=1)
        self.dense = nn.Linear(16 * channels[4], channels[4])
        self.logit = nn.Linear(channels[4], 1)
        self.register_buffer("alpha", torch.ones(()))
        self.fading = False
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif name.startswith("logit"):
                nn.init.kaiming_normal_(parameter, nonlinearity="linear")
            else:
                nn.init.kaiming_normal_(parameter, a=LEAK)

    def new_parameters(self) -> set[str]:
        """Names of the parameters that this resolution adds: its block and its FromRGB."""
        prefixes = (f"blocks.{self.resolution}.", f"from_rgb.{self.resolution}.")
        return {name for name, _ in self.named_parameters() if name.startswith(prefixes)}

    def old_from_rgb(self) -> set[str]:
        """Names of the parameters of the FromRGB before, which is used only while fading in."""
        prefix = f"from_rgb.{self.resolution // 2}."
        return {name for name, _ in self.named_parameters() if name.startswith(prefix)}

    def set_fade(self, alpha: float, fading: bool) -> None:
        """Set the share of the new block (0 to 1), and whether it is fading in."""
        self.fading = fading
        self.alpha.fill_(alpha)

    def forward(self, images: Tensor, num_batches: int = 1) -> Tensor:
        """Images (B, 3, R, R) -> logits (B,).

        Args:
            images: one batch, or several of equal size; no group has samples of two.
            num_batches: how many.
        """
        x = self._features(images, self.resolution)
        for size, block in self.blocks.items():
            x = block(x)
            if self.fading and size == str(self.resolution):
                old = self._features(F.avg_pool2d(images, 2), self.resolution // 2)
                # float32 by hand: lerp takes no two types, and alpha is float32
                x = torch.lerp(old.float(), x.float(), self.alpha).to(x.dtype)
        own = cast_together(self.conv, self.dense, self.logit)
        x = conv(self.conv, minibatch_std(x, self.group_size, num_batches), own[0])
        x = F.linear(leaky_relu(x, LEAK).flatten(1), *own[1])
        return F.linear(leaky_relu(x, LEAK), *own[2]).flatten()

    def _features(self, images: Tensor, size: int) -> Tensor:
        """Images of side ``size`` as the features that its block takes."""
        return leaky_relu(_convolved(self.from_rgb[str(size)], images), LEAK)


def _convolved(layer: nn.Module, x: Tensor) -> Tensor:
    """The 1x1 convolution, its weight and bias cast together."""
    return F.conv2d(x, *cast_together(layer)[0])


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
            embedding = z.new_zeros(z.shape[0], self.embed_dim)
            keep = torch.zeros(z.shape[0], dtype=torch.bool, device=z.device)
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
