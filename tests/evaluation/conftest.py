"""The data and configs of tests/training."""

from tests.training.conftest import (  # noqa: F401
    data_folder,
    guide_folder,
    make_config,
    no_downloads,
)
