"""A figure in JSON and back, and figures that are none."""

from __future__ import annotations

import json

import pytest

from dinogen.metrics.value import Figure


def test_it_comes_back_from_json():
    figure = Figure("fid768", 1.25, 0.5, "lower", 5000, 700, "0123456789ab")
    stored = json.loads(json.dumps(figure.to_dict(), allow_nan=False))
    assert stored["reason"] is None
    assert Figure.from_dict(stored) == figure
    assert Figure.from_dict(stored | {"added_later": 1}) == figure


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_no_value(value):
    figure = Figure("kid", value, 1.0, "lower", 5000, 700, None)
    assert figure.value is None and figure.spread is None
    assert str(value) in figure.reason
    assert Figure("kid", 1.0, value, "lower", 5000, 700, None).spread is None


def test_a_missing_figure_says_why():
    figure = Figure.missing("fid", "lower", "metrics.inception: no file")
    assert (figure.value, figure.reason) == (None, "metrics.inception: no file")
    with pytest.raises(ValueError, match="fid has no value and no reason"):
        Figure("fid", None, None, "lower", 0, None, None)
