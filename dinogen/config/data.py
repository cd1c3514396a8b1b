"""The section ``data:`` of a config: which shards are read, and how."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from dinogen.config.base import Section


class MixConfig(Section):
    """One of several datasets that are mixed."""

    path: str = Field(..., min_length=1, description="folder or fsspec URL of packed shards")
    weight: float = Field(
        ..., gt=0, allow_inf_nan=False, description="its share of the samples, relative to others"
    )


class DataConfig(Section):
    """Which shards are read, and how."""

    path: str = Field(
        "data/faces", description="folder or fsspec URL of packed shards; empty if mix is given"
    )
    mix: tuple[MixConfig, ...] = Field(
        (), description="several datasets instead of path, mixed by weight"
    )
    split: Literal["train", "val", "test"] = Field("train", description="split trained on")
    num_lanes: int = Field(64, ge=1, description="lanes of the global order")
    window_shards: int = Field(4, ge=1, description="samples shuffled together, in shards")
    num_threads: int = Field(1, ge=0, le=16, description="reader threads; 0 reads in the step")
    on_error: Literal["stop", "skip"] = Field(
        "stop", description="a corrupt sample stops the run, or is replaced and counted"
    )
    cache_dir: Path | None = Field(None, description="where remote shards are kept")
    cache_gb: float | None = Field(
        None, gt=0, description="size limit of that cache, GB; the least recently used are evicted"
    )

    @model_validator(mode="before")
    @classmethod
    def _no_path_beside_a_mix(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("mix") and "path" not in values:
            return {**values, "path": ""}
        return values

    @model_validator(mode="after")
    def _one_of_both(self) -> DataConfig:
        if self.mix and self.path:
            raise ValueError(f"path {self.path} and mix are both given: leave one of them out")
        if len(self.mix) == 1:
            raise ValueError("mix: give two or more datasets, or the single one as path")
        if not self.mix and not self.path:
            raise ValueError("path is empty: give the folder or URL of packed shards")
        return self

    @property
    def location(self) -> str:
        """The path, or the paths of a mix."""
        return self.path or " + ".join(one.path for one in self.mix)
