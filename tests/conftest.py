"""Which tests run in one process, one after the other, when several processes share them."""

from __future__ import annotations

import pytest


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Each file stays whole, for its fixtures are dear; all that use the cluster are one."""
    from xdist.scheduler import LoadFileScheduling

    class ByFile(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return "tests/slurm" if file.startswith("tests/slurm/") else file

    return ByFile(config, log)
