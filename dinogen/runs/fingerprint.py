"""Fingerprints of metric values: their ids, what differs, and which values can be compared."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

_DIGITS = 12


def fingerprint_id(facts: Mapping[str, Any]) -> str:
    """12 hex digits of a fingerprint, regardless of the order of its keys."""
    text = json.dumps(facts, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:_DIGITS]


def alike_facts(facts: Mapping[str, Any]) -> Mapping[str, Any]:
    """What two values need in common so that they can be compared.

    That is the fingerprint without how a model draws samples, as far as the samples are what anyone
    would draw from it: with noise for each image, as StyleGAN2 has it, and with classes in their
    shares of the data, which are as fair a sample as that of a model without classes. Classes in
    turn are another mix, and stay.
    """
    sampling = facts.get("sampling")
    if not isinstance(sampling, Mapping):
        return facts
    left = {
        key: value
        for key, value in sampling.items()
        if not (key == "noise" and value == "per image")
        and not (key == "classes" and isinstance(value, list))
    }
    rest = {key: value for key, value in facts.items() if key != "sampling"}
    return rest | {"sampling": left} if left else rest


def alike_id(fingerprint: str | None, known: Mapping[str, Mapping[str, Any]]) -> str | None:
    """An id that is the same for values that can be compared: that of :func:`alike_facts`.

    Args:
        fingerprint: id of a fingerprint; None for values without one.
        known: fingerprints by id; an id that is not among them stays as it is.
    """
    facts = known.get(fingerprint or "")
    if facts is None:
        return fingerprint
    alike = alike_facts(facts)
    return fingerprint if alike == facts else fingerprint_id(alike)


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
