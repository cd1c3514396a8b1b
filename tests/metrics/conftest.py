"""Where real images and weights for measuring are, on machines that have them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dinogen._torchvision import ensure_torchvision

ensure_torchvision()


@pytest.fixture(scope="session")
def assets() -> Path:
    default = Path(__file__).parents[3] / "shared" / "assets"
    folder = Path(os.environ.get("DINOGEN_ASSETS", default))
    if not (folder / "inception").is_dir():
        pytest.skip(f"no measuring data at {folder}: set DINOGEN_ASSETS")
    return folder
