"""What a figure was measured against, as one short id: only figures of one id can be compared.

Resize filters, reference sets and sample counts move a FID by more than most improvements do
(Parmar et al. 2022, "On Aliased Resizing and Surprising Subtleties in GAN Evaluation"; Chong and
Forsyth 2020, "Effectively Unbiased FID"), so all of them are part of it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from dinogen.metrics.extractors.base import ExtractorInfo

Facts = dict[str, Any]
_DIGITS = 12


def fingerprint(
    extractor: ExtractorInfo,
    resolution: int,
    num_samples: int,
    reference: Facts | None = None,
    num_reference: int | None = None,
    sampling: Facts | None = None,
) -> Facts:
    """Everything that two figures of one metric need to have in common.

    Args:
        feature extractor: by whom images are judged.
        resolution: side of the generated images.
        num_samples: how many there are.
        reference: what ``Reference.facts`` says; None where a metric compares with nothing.
        num_reference: how many real images.
        sampling: how they were drawn, where that is not as everywhere: shares of classes, noise.

    Returns:
        ``data``, ``split``, ``num_reference``, ``num_samples``, ``resolution``, ``resize``,
        ``extractor``, ``weights_sha256`` and ``random``, JSON-ready; and ``sampling``, if there is
        any, so that figures of other families keep the ids that they always had.
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
        "judge": extractor.name,
        "weights_sha256": extractor.weights_sha256,
        "random": extractor.random,
        **({"sampling": sampling} if sampling else {}),
    }


def fingerprint_id(facts: Mapping[str, Any]) -> str:
    """12 hex digits of a fingerprint, whatever the order of its keys."""
    text = json.dumps(facts, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:_DIGITS]


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """In what two fingerprints differ, a phrase each: ``split: val, not test``."""
    keys = [*one, *(key for key in other if key not in one)]
    return [
        f"{key}: {_short(one.get(key))}, not {_short(other.get(key))}"
        for key in keys
        if one.get(key) != other.get(key)
    ]


def _short(value: object) -> str:
    """A value for people: of a hash its first digits."""
    text = str(value)
    return text[:_DIGITS] if isinstance(value, str) and len(text) == 64 else text
