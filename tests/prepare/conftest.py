"""Photos for the tests: a real face from scikit-image, real portraits where they are at hand."""

import os
from pathlib import Path

import numpy as np
import pytest
from skimage import data

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def astronaut():
    """512x512 RGB with one face, about (181, 62) to (268, 172)."""
    return data.astronaut()


@pytest.fixture(scope="session")
def assets():
    folder = Path(os.environ.get("DINOGEN_ASSETS", ROOT.parent / "shared" / "assets"))
    if not folder.is_dir():
        pytest.skip(f"no real photos at {folder} (set DINOGEN_ASSETS)")
    return folder


@pytest.fixture
def noise():
    """64x48 RGB in which every pixel is different."""
    return np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
