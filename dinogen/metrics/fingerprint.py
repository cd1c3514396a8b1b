"""What a metric was measured against, as one short id: only values of one id can be compared.

Resize filters, reference sets and sample counts move a FID by more than most improvements do
(Parmar et al. 2022, "On Aliased Resizing and Surprising Subtleties in GAN Evaluation"; Chong and
Forsyth 2020, "Effectively Unbiased FID"), so all of them are part of it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dinogen.metrics.extractors.base import ExtractorInfo
from shards.files import sha256_file
from shards.read.dataset import Dataset

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
    """Everything that two metric values of one metric need to have in common.

    Args:
        extractor: what sees the images.
        resolution: side of the generated images.
        num_samples: how many there are.
        reference: from ``Reference.facts``; None if the metric compares with nothing.
        num_reference: how many real images.
        sampling: how they were drawn, if not in the usual way: shares of classes, noise.

    Returns:
        ``data``, ``split``, ``num_reference``, ``num_samples``, ``resolution``, ``resize``,
        ``extractor``, ``weights_sha256`` and ``random``, JSON-ready; and ``sampling``, if there is
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
        "judge": extractor.name,
        "weights_sha256": extractor.weights_sha256,
        "random": extractor.random,
        **({"sampling": sampling} if sampling else {}),
    }


def fingerprint_id(facts: Mapping[str, Any]) -> str:
    """12 hex digits of a fingerprint; the order of its keys does not matter."""
    text = json.dumps(facts, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:_DIGITS]


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Where two fingerprints differ, one phrase each: ``split: val, not test``."""
    keys = [*one, *(key for key in other if key not in one)]
    return [
        f"{key}: {_short(one.get(key))}, not {_short(other.get(key))}"
        for key in keys
        if one.get(key) != other.get(key)
    ]


def data_sha256(data: Dataset) -> str:
    """Hash of the contents of all shards of a dataset, and of the weights of a mix."""
    parts: list[object] = []
    for one, weight in zip(data.sets, data.weights, strict=True):
        shards = one.manifest.shards
        # plain tars have no hash of their own
        parts.append([(s.split, s.num_samples, s.sha256 or [s.name, s.num_bytes]) for s in shards])
        parts.append(str(weight))
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def files_sha256(files: Iterable[Path]) -> str:
    """Hash of the contents of files, in their order; their names do not matter."""
    text = "\n".join(sha256_file(file) for file in files)
    return hashlib.sha256(text.encode()).hexdigest()


def _short(value: object) -> str:
    """A value as people read it: the first digits of a hash."""
    text = str(value)
    return text[:_DIGITS] if isinstance(value, str) and len(text) == 64 else text
