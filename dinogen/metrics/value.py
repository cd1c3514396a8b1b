"""A metric's value, its spread over halves of the rows, and what it was measured against.

Resize filters, reference sets and sample counts move a FID by more than most improvements do
(Parmar et al. 2022, "On Aliased Resizing and Surprising Subtleties in GAN Evaluation"; Chong and
Forsyth 2020, "Effectively Unbiased FID"), so all of them are part of a fingerprint. Which
values can be compared, :func:`dinogen.runs.fingerprint.alike_facts` says.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor

from dinogen.distributed import rng
from dinogen.metrics.extractors.base import ExtractorInfo

Better = Literal["lower", "higher", "none"]
Facts = dict[str, Any]  # a fingerprint, or a part of one


@dataclass(frozen=True)
class MetricValue:
    """One metric of one set of generated images. A value that is not finite becomes None.

    Attributes:
        name: of the metric, such as ``fid768``.
        value: None if it is not available.
        spread: its standard error; None where it is not known.
        better: which way is better; ``none`` if neither is.
        num_samples: generated images behind it.
        num_reference: real images behind it; None where it needs none.
        fingerprint: id of what it was measured against, and how.
        reason: why the value is None, with the remedy; None otherwise.
        caution: why it has to be read with care; None if there is no reason to.
    """

    name: str
    value: float | None
    spread: float | None
    better: Better
    num_samples: int
    num_reference: int | None
    fingerprint: str | None
    reason: str | None = None
    caution: str | None = None

    def __post_init__(self) -> None:
        if self.value is not None and not math.isfinite(self.value):
            reason = self.reason or f"it came to {self.value}: look at the images"
            object.__setattr__(self, "value", None)
            object.__setattr__(self, "reason", reason)
        if self.spread is not None and (self.value is None or not math.isfinite(self.spread)):
            object.__setattr__(self, "spread", None)
        if self.value is None and not self.reason:
            raise ValueError(f"{self.name} has no value and no reason")

    @classmethod
    def missing(cls, name: str, better: Better, reason: str) -> MetricValue:
        """A metric value that is not available, and why."""
        return cls(name, None, None, better, 0, None, None, reason)

    def to_dict(self) -> dict[str, Any]:
        """As a JSON-ready mapping."""
        return asdict(self)

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> MetricValue:
        """Back from :meth:`to_dict`; keys of later versions are ignored.

        Raises:
            TypeError: a key is missing.
        """
        known = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in stored.items() if name in known})


FEWEST_ROWS = 20  # of which a half still says something


@dataclass(frozen=True)
class Estimate:
    """A metric value and its standard error; None where that cannot be said."""

    value: float
    spread: float | None


def halves(num_rows: int, num: int, seed: int) -> list[Tensor]:
    """Random halves of rows, the same for the same arguments.

    Args:
        num_rows: N.
        num: how many halves.
        seed: of the draws.

    Returns:
        ``num`` sorted int64 tensors of N // 2 row numbers; none if there are fewer than
        ``FEWEST_ROWS`` rows or ``num`` is below 2, because nothing can be said of a spread.
    """
    if num_rows < FEWEST_ROWS or num < 2:
        return []
    rows = torch.arange(num_rows)
    found = []
    for number in range(num):
        order = rng.uniform(seed, f"halves/{number}", rows).argsort(stable=True)
        found.append(order[: num_rows // 2].sort().values)
    return found


def standard_deviation(values: Sequence[float]) -> float | None:
    """Of metric values of :func:`halves`; None of fewer than two."""
    return statistics.stdev(values) if len(values) > 1 else None


def fingerprint(
    extractor: ExtractorInfo,
    resolution: int,
    num_samples: int,
    reference: Facts | None = None,
    num_reference: int | None = None,
    sampling: Facts | None = None,
) -> Facts:
    """Everything that two metric values of one metric need to have in common.

    Args:
        extractor: that sees the images.
        resolution: side of the generated images.
        num_samples: how many there are.
        reference: what ``Reference.facts`` says; None where a metric compares with nothing.
        num_reference: how many real images.
        sampling: how they were drawn, where that is not as everywhere: shares of classes, noise.

    Returns:
        ``data``, ``split``, ``num_reference``, ``num_samples``, ``resolution``, ``resize``,
        ``judge``, ``weights_sha256`` and ``random``, JSON-ready; and ``sampling``, if there is
        any, so that metric values of other families keep the ids that they always had.
    """
    facts = reference or {"data": None, "split": None, "resize": "none"}
    return {
        "data": facts["data"],
        "split": facts["split"],
        "num_reference": num_reference,
        "num_samples": num_samples,
        "resolution": resolution,
        # every filter between a stored image and the feature extractor, in order
        "resize": f"{facts['resize']}, then {extractor.resize}",
        # the extractor under the key that it always had: ids of stored values depend on it
        "judge": extractor.name,
        "weights_sha256": extractor.weights_sha256,
        "random": extractor.random,
        **({"sampling": sampling} if sampling else {}),
    }
