"""Three tiny trained runs: one that truncates, one of two stages, one with a random guide."""

from __future__ import annotations

from pathlib import Path

import pytest
from starlette.testclient import TestClient

from dinogen.serve.app import make_app
from dinogen.serve.gallery import Gallery
from dinogen.training.run import train
from tests.families.conftest import disc_data  # noqa: F401 - a fixture
from tests.families.tiny import tiny_config

HERE = "http://127.0.0.1:8000"
TWO_STAGES = (
    "stages=[{resolution: 8, kimg: 0.016, batch: 8}, "
    "{resolution: 16, kimg: 0.016, fade_kimg: 0.008, batch: 8}]"
)


@pytest.fixture(scope="session")
def runs(tmp_path_factory, disc_data) -> dict[str, Path]:  # noqa: F811
    """Folders of the runs: ``truncates``, ``two_stages`` and ``guided``."""
    folder = tmp_path_factory.mktemp("serve")
    made = {}
    for name, family, *overrides in (
        ("truncates", "stylegan2_ada"),
        ("two_stages", "progressive_gan", TWO_STAGES),
        ("guided", "guided"),
    ):
        train(tiny_config(family, disc_data, folder / name, *overrides))
        made[name] = folder / name
    return made


@pytest.fixture(scope="session")
def galleries(runs) -> dict[str, Gallery]:
    """What is served of each run."""
    return {name: Gallery(run) for name, run in runs.items()}


@pytest.fixture
def clients(galleries) -> dict[str, TestClient]:
    """Ask each run's application without a network."""
    return {
        name: TestClient(make_app(gallery, ["127.0.0.1"]), base_url=HERE)
        for name, gallery in galleries.items()
    }
