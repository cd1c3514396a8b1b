"""What a non-editable install takes along: every pattern of setup.cfg names files."""

from __future__ import annotations

from configparser import ConfigParser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def patterns():
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    section = setup["options.package_data"]
    return [(package, pattern) for package in section for pattern in section[package].split()]


@pytest.mark.parametrize(("package", "pattern"), patterns())
def test_each_pattern_of_the_package_data_matches(package, pattern):
    assert list((ROOT / package).glob(pattern))
