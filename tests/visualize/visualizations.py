"""The images of a visualization, and when two of them are alike."""

from __future__ import annotations

import numpy as np

from dinogen.report.images import to_uint8


def images_of(drawing):
    """Images of a drawing with one sheet, (N, R, R, 3) uint8."""
    (sheet,) = drawing.sheets
    return to_uint8(np.asarray(sheet.images)).astype(int)


def alike(found, expected):
    """The same but for what a batch of another size may round otherwise."""
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= 1
