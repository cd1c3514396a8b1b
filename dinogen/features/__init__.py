"""Frozen feature networks behind one Guide protocol."""

from dinogen.features.base import Guide, GuideError, GuideInfo, same_guide
from dinogen.features.load import load_guide
from dinogen.features.pyramid import base_grid_of, native_pyramid, pooled_pyramid

__all__ = [
    "Guide",
    "GuideError",
    "GuideInfo",
    "base_grid_of",
    "load_guide",
    "native_pyramid",
    "pooled_pyramid",
    "same_guide",
]
