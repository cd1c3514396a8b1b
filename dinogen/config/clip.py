"""The section ``clip:`` of a config: the network that puts pictures and captions side by side."""

from __future__ import annotations

from pydantic import Field

from dinogen.config.base import Section


class ClipConfig(Section):
    """CLIP; where it is named, ``dinogen prepare`` stores its embeddings of every sample."""

    path: str = Field(description="hub name, or local checkpoint folder")
    revision: str | None = Field(None, description="hub revision (commit, tag or branch)")
