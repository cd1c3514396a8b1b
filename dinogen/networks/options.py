"""Keys of ``family:`` that choose a denoising network: a U-Net or a transformer, and its size."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from dinogen.config import Section
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
_OF_UNET = (
    "base_channels",
    "channel_multipliers",
    "num_blocks",
    "attention_resolutions",
    "head_channels",
    "unet",
)


class NetworkOptions(Section):
    """Which network takes noise out of images."""

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

    @model_validator(mode="after")
    def _check_network(self) -> NetworkOptions:
        if self.network == "unet":
            if self.dit is not None:
                raise ValueError("dit: belongs to network: dit: set it, or leave dit: out")
            return self
        for name in _OF_UNET:
            if getattr(self, name) != NetworkOptions.model_fields[name].default:
                raise ValueError(f"{name} belongs to network: unet: leave it out beside dit")
        return self

    def network_arguments(self) -> dict[str, Any]:
        """What the network is built with, as far as these keys say."""
        if self.network == "dit":
            return (self.dit or DiTOptions()).arguments()
        arguments = self.model_dump(mode="json", include=set(_OF_UNET) - {"unet"})
        if self.unet is not None:
            arguments["variant"] = self.unet.model_dump(mode="json")
        return arguments
