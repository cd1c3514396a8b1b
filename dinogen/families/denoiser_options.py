"""Keys of ``family:`` that `ddpm` and `flow` share: network, classes, guidance, further parts."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from dinogen.config import Section
from dinogen.families.latent import LatentOptions
from dinogen.guidance.alignment import RepaOptions
from dinogen.guidance.representation import RepresentationOptions
from dinogen.networks.dit import SIZES


class UNetOptions(Section):
    """What a U-Net that was trained elsewhere does otherwise; the defaults are what ours do."""

    norm_groups: int | None = Field(
        None, ge=1, description="groups of every norm; default: at most 32, of at least 4 channels"
    )
    norm_eps: float = Field(1e-5, gt=0, description="added to the variance of a group")
    scale: bool = Field(
        True, description="the time embedding scales and shifts; false: it is added, no more"
    )
    num_heads: int | None = Field(
        None, ge=1, description="heads of every attention, in place of head_channels"
    )
    middle_norm: bool = Field(True, description="the attention in the middle has a norm")
    resampling: Literal["conv", "block"] = Field(
        "conv", description="sides are halved and doubled by a convolution, or a residual block"
    )
    downsample_padding: Literal["all", "end"] = Field(
        "all", description="where a halving convolution adds zeros; end: right and bottom alone"
    )
    last_frequency: Literal["near", "exact"] = Field(
        "near", description="the time embedding ends near a frequency of 1/10000, or exactly there"
    )
    time_scale: float = Field(1.0, gt=0, description="factor of time steps before the embedding")
    time_channels: int | None = Field(
        None, ge=2, description="size of the time embedding; default: base_channels"
    )


class DiTOptions(Section):
    """A diffusion transformer, by the name of its size or by its numbers."""

    size: Literal["S", "B", "L", "XL"] | None = Field(
        None,
        description="of Peebles and Xie: S 384 wide and 12 deep, B 768 and 12, L 1024 and 24, XL "
        "1152 and 28; default: S, or the three numbers",
    )
    width: int | None = Field(None, ge=4, description="of the tokens")
    depth: int | None = Field(None, ge=1, description="number of blocks")
    num_heads: int | None = Field(None, ge=1, description="of each attention")
    patch: int = Field(2, ge=1, description="side of the patch of pixels that is one token")
    num_registers: int = Field(0, ge=0, description="tokens that belong to no patch")
    qk_norm: bool = Field(True, description="normalise the queries and keys of each head")

    @model_validator(mode="after")
    def _check(self) -> DiTOptions:
        given = [name for name in _BY_SIZE if getattr(self, name) is not None]
        if given and self.size is not None:
            raise ValueError(f"size {self.size} says {given[0]} already: leave out one of them")
        if given and len(given) < len(_BY_SIZE):
            missing = next(name for name in _BY_SIZE if name not in given)
            raise ValueError(
                f"{missing} is missing: give width, depth and num_heads together, or a size"
            )
        return self

    def arguments(self) -> dict[str, Any]:
        """What a DiT is built with."""
        own = {name: getattr(self, name) for name in _BY_SIZE}
        sized = SIZES[self.size or "S"] if self.width is None else own
        return sized | self.model_dump(include={"patch", "num_registers", "qk_norm"})


_BY_SIZE = ("width", "depth", "num_heads")
# Keys that a U-Net is built with.
OF_UNET = (
    "base_channels",
    "channel_multipliers",
    "num_blocks",
    "attention_resolutions",
    "head_channels",
    "unet",
)


class DenoiserOptions(Section):
    """Keys of ``family:`` that `ddpm` and `flow` have."""

    prediction: str = Field("v", description="what the network predicts")
    network: Literal["unet", "dit"] = Field(
        "unet", description="a convolutional U-Net, or a transformer with the keys of dit:"
    )
    dit: DiTOptions | None = Field(
        None, description="size of the transformer of network: dit; default: S, patches of 2"
    )
    base_channels: int = Field(128, ge=2, description="channels at full resolution")
    channel_multipliers: tuple[int, ...] = Field(
        (1, 2, 3, 4), description="channels of each level over the base; each halves the side"
    )
    num_blocks: int = Field(2, ge=1, description="residual blocks per level")
    attention_resolutions: tuple[int, ...] = Field(
        (16, 8), description="sides at which blocks have self-attention"
    )
    head_channels: int = Field(64, ge=1, description="width of an attention head")
    unet: UNetOptions | None = Field(
        None,
        description="details of a U-Net that was trained elsewhere, as `dinogen import` writes "
        "them; default: ours",
    )
    dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of a residual block's activations that a step leaves out; Ho et al. "
        "take 0.1 for small data sets",
    )
    sample_steps: int = Field(100, ge=1, description="steps from noise to an image")
    num_classes: int = Field(0, ge=0, description="labels are 0 to this less 1; 0: no labels")
    guidance: float = Field(
        1.0, ge=0, description="pull towards the class: 0 none, 1 as learnt, more exaggerates"
    )
    guidance_interval: tuple[float, float] | None = Field(
        None,
        description="part of the walk that guidance acts in, as shares: 0 is noise, 1 the image; "
        "default: all of it",
    )
    repa: RepaOptions | None = Field(
        None, description="align hidden tokens with stored features; default: do not"
    )
    representation: RepresentationOptions | None = Field(
        None,
        description="generate a global feature first, and the image from it (RCG); default: do not",
    )
    latent: LatentOptions | None = Field(
        None, description="train on latents of an autoencoder in place of pixels; default: pixels"
    )

    @model_validator(mode="after")
    def _check_network(self) -> DenoiserOptions:
        if self.network == "unet":
            if self.dit is not None:
                raise ValueError("dit: belongs to network: dit: set it, or leave dit: out")
            return self
        for name in OF_UNET:
            if getattr(self, name) != DenoiserOptions.model_fields[name].default:
                raise ValueError(f"{name} belongs to network: unet: leave it out beside dit")
        return self

    @model_validator(mode="after")
    def _check_guidance(self) -> DenoiserOptions:
        features = self.representation
        conditional = self.num_classes > 0 or features is not None
        if self.guidance != 1 and not conditional:
            raise ValueError(
                f"guidance {self.guidance} needs classes to pull to, or features: set num_classes "
                "or representation, or leave guidance out"
            )
        if self.guidance != 1 and features is not None and not features.dropout:
            raise ValueError(
                f"guidance {self.guidance} weighs what is learnt with and without features: set "
                "representation.dropout above 0, or leave guidance out"
            )
        if self.guidance_interval is None:
            return self
        low, high = self.guidance_interval
        if not 0 <= low < high <= 1:
            raise ValueError(
                f"guidance_interval [{low}, {high}]: give two shares of the walk between 0 and 1, "
                "the smaller one first, such as [0.2, 0.8]"
            )
        if not conditional:
            raise ValueError(
                "guidance_interval needs classes to pull to, or features: set num_classes or "
                "representation, or leave it out"
            )
        return self
