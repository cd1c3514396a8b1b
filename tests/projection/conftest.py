"""Runs of four steps, photos of discs, and projections of them."""

from __future__ import annotations

import pytest
from PIL import Image

from dinogen.projection.project import ProjectionRequest, project
from tests.families.tiny import discs
from tests.visualize.conftest import runs  # noqa: F401


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Three crops that the runs were not trained on, 32x24 pixels."""
    folder = tmp_path_factory.mktemp("photos")
    for number, pixels in enumerate(discs(30, 32)[27:]):
        Image.fromarray(pixels[4:28]).save(folder / f"disc{number}.png")
    return folder


@pytest.fixture(scope="module")
def projected(runs, photos, tmp_path_factory):  # noqa: F811
    """The folder of a run's projections in a space, one of each photo."""
    done = {}

    def folder_of(family, space=None):
        if (family, space) not in done:
            out = tmp_path_factory.mktemp(f"{family}-projected")
            request = ProjectionRequest(
                runs(family),
                (photos,),
                space,
                steps=None if family == "vae" else 4,
                restarts=2,
                loss="pixels",
                align=False,
                out=out,
            )
            project(request)
            done[family, space] = out
        return done[family, space]

    return folder_of
