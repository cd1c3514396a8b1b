"""The section ``prepare:`` of a config: photos to faces, pyramids and shards."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from dinogen.config.base import Section


class FacesConfig(Section):
    """Photo -> square image: an aligned face, or the photo itself."""

    size: int = Field(256, ge=8, le=2048, description="side of the square, pixels")
    detect: Literal["mtcnn", "none"] = Field(
        "mtcnn", description="mtcnn: detect faces; none: use each photo as it is"
    )
    align: Literal["landmarks", "ffhq", "box"] = Field(
        "landmarks",
        description="for faces: landmarks: move five points onto the reference; ffhq: the FFHQ "
        "square; box: a square around the face",
    )
    fit: Literal["crop", "resize"] = Field(
        "crop",
        description="with detect: none: crop: the largest centred square; resize: the whole photo, "
        "squeezed to a square",
    )
    classes: Literal["none", "folders"] = Field(
        "none", description="folders: the first folder below the photos is the class"
    )
    which: Literal["largest", "all"] = Field(
        "largest", description="the largest face of a photo, or every face"
    )
    margin: float = Field(0.3, ge=0, le=4, description="for box: margin as a fraction of its side")
    min_face: int = Field(20, ge=1, description="smallest face box side accepted, pixels")
    min_probability: float = Field(0.95, ge=0, le=1, description="lowest MTCNN probability")
    min_blur: float = Field(
        0.0, ge=0, description="lowest variance of Laplacian of the crop; 0 accepts all"
    )
    max_duplicate_distance: int = Field(
        -1,
        ge=-1,
        le=64,
        description="largest distance of the perceptual hashes of duplicates, in bits; -1: off",
    )
    max_pixels: int = Field(
        100_000_000, ge=1, description="a photo with more pixels is rejected before decoding"
    )
    format: Literal["jpg", "png"] = Field("jpg", description="encoding of the crops")
    quality: int = Field(95, ge=1, le=100, description="JPEG quality (4:4:4 chroma)")
    batch: int = Field(16, ge=1, description="photos of equal size per batch of the detector")
    num_threads: int = Field(2, ge=1, description="threads that decode photos")

    @model_validator(mode="before")
    @classmethod
    def _as_it_was_written_once(cls, values: Any) -> Any:
        # Checkpoints and datasets of older versions contain it.
        if isinstance(values, dict) and values.get("align") == "none":
            return {**values, "align": "landmarks", "detect": "none"}
        return values


class PyramidsConfig(Section):
    """Aligned face -> pyramid of guide features."""

    make: Literal["auto", "always", "never"] = Field(
        "auto", description="auto: unless the config's family reads no pyramids"
    )
    grids: tuple[int, ...] = Field(
        (4, 8, 16), min_length=1, description="grids of the pyramid; pooled has 16, 8, 4, 2 and 1"
    )
    base_grid: Literal[16, 8] = Field(
        16,
        description="pooled levels are means of this grid; with 8 the guide sees a quarter of the "
        "pixels",
    )
    kinds: tuple[Literal["pooled", "native"], ...] = Field(
        ("pooled", "native"),
        min_length=1,
        description="pooled: exact 2x2 means of the base_grid; "
        "native: features of the image shrunk to g x g pixels",
    )
    batch: int = Field(32, ge=1, description="images per forward of the guide")
    shard_size: int = Field(256, ge=1, description="images per intermediate part")

    @model_validator(mode="after")
    def _check(self) -> PyramidsConfig:
        if len(set(self.grids)) < len(self.grids) or len(set(self.kinds)) < len(self.kinds):
            raise ValueError("grids and kinds: list each of them once")
        pooled = [grid for grid in (16, 8, 4, 2, 1) if grid <= self.base_grid]
        allowed = set(pooled) if "pooled" in self.kinds else set(range(1, 129))
        if wrong := sorted(set(self.grids) - allowed):
            raise ValueError(
                f"grids: {wrong[0]} is not a pooled grid: use {', '.join(map(str, pooled[:-1]))} "
                "or 1" + (", or base_grid: 16" if self.base_grid < wrong[0] <= 16 else "")
                if "pooled" in self.kinds
                else f"grids: {wrong[0]} is not from 1 to 128"
            )
        return self


class PackConfig(Section):
    """Samples -> tar shards."""

    shard_size: int = Field(1000, ge=1, description="samples per shard")
    val_fraction: float = Field(0.0, ge=0, lt=1, description="fraction of keys in the val split")
    test_fraction: float = Field(0.0, ge=0, lt=1, description="fraction of keys in the test split")


class PrepareConfig(Section):
    """Photos to shards: ``dinogen prepare`` and its three steps."""

    faces: FacesConfig = FacesConfig()
    pyramids: PyramidsConfig = PyramidsConfig()
    pack: PackConfig = PackConfig()
