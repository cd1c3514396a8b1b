"""Which tests have to run in one process, one after the other, when several run at a time."""

from __future__ import annotations

from pathlib import Path

import pytest

SLURM = Path(__file__).parent / "slurm"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Each file is one group, for its fixtures are dear; all that use the cluster are one."""
    for item in items:
        group = SLURM if SLURM in item.path.parents else item.path
        item.add_marker(pytest.mark.xdist_group(str(group.relative_to(SLURM.parent))))
