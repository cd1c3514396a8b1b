"""Kinds of values in the files of a run: how they are checked, named before, and when uncertain.

A kind is a function: it returns the value, or raises a ValueError that says what is wrong with it.
JSON is read as dinogen writes it: numbers that are not finite become None, and so do whole numbers
of absurd length. A run that an earlier version began keeps its old file names; its keys are renamed
as they are read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Kind = Callable[[Any], Any]

MAX_VALUES = 200_000  # in a config: YAML's aliases can make a small file endless
_MAX_DIGITS = 20  # of a whole number
_MAX_NUMBER = 1e100  # squares of it are finite


def checked(
    value: Mapping[str, Any], kinds: Mapping[str, Kind]
) -> tuple[dict[str, Any], list[str]]:
    """A mapping with its known keys checked, and what was left out.

    Unknown keys are kept, since a later version may have written them. None is kept too.
    """
    sound: dict[str, Any] = {}
    problems = []
    for key, one in value.items():
        kind = kinds.get(key)
        if kind is None or one is None:
            sound[key] = one
            continue
        try:
            sound[key] = kind(one)
        except Partly as error:
            sound[key] = error.sound
            problems += [f"{key}: {reason}" for reason in error.reasons]
        except ValueError as error:
            problems.append(f"{key}: {error}")
    return sound, problems


def finite(value: Any) -> float | None:
    """A finite number, else None."""
    try:
        return number(value)
    except ValueError:
        return None


def number(value: Any) -> float:
    """A finite number.

    Raises:
        ValueError: it is not.
    """
    plain = isinstance(value, (int, float)) and not isinstance(value, bool)
    if plain and abs(value) <= _MAX_NUMBER:  # neither NaN nor what float cannot hold
        return float(value)
    raise ValueError(f"{short(value)} is not a finite number")


def amount(value: Any) -> float:
    """A finite number >= 0.

    Raises:
        ValueError: it is not.
    """
    if number(value) < 0:
        raise ValueError(f"{short(value)} is below 0")
    return float(value)


def count(value: Any, name: str = "") -> int:
    """A whole number >= 0.

    Raises:
        ValueError: it is not.
    """
    whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    if isinstance(value, bool) or not whole or not 0 <= value < 1 << 63:
        raise ValueError(f"{name}{': ' if name else ''}{short(value)} is not a whole number >= 0")
    return int(value)


def word(value: Any, name: str = "") -> str:
    """Text.

    Raises:
        ValueError: it is not.
    """
    if not isinstance(value, str):
        raise ValueError(f"{name}{': ' if name else ''}{short(value)} is not text")
    return value


def text_of(value: Any) -> str:
    """A single value as text: ``step: 2`` is a number in YAML.

    Raises:
        ValueError: a list or a mapping.
    """
    if isinstance(value, (dict, list)):
        raise ValueError(f"{short(value)} is not text")
    return str(value)


def section(value: Any, name: str = "") -> dict[str, Any]:
    """A mapping.

    Raises:
        ValueError: it is not.
    """
    if not isinstance(value, dict):
        given = f"{name}{': ' if name else ''}{short(value)}"
        raise ValueError(f"{given} is not a mapping of keys to values")
    return value


def flag(value: Any) -> bool:
    """True or false.

    Raises:
        ValueError: it is neither.
    """
    if not isinstance(value, bool):
        raise ValueError(f"{short(value)} is neither true nor false")
    return value


class Partly(ValueError):
    """A value that is valid in part."""

    def __init__(self, sound: Any, reasons: list[str]) -> None:
        super().__init__("; ".join(reasons))
        self.sound, self.reasons = sound, reasons


def keys_of(kinds: Mapping[str, Kind], needs: tuple[str, ...] = ()) -> Kind:
    """A mapping with its known keys checked; each of ``needs`` is required."""

    def check(value: Any) -> dict[str, Any]:
        sound, reasons = checked(section(value), kinds)
        for key in needs:
            if key not in sound:
                raise ValueError("; ".join(reasons) or f"{key} is missing")
        if reasons:
            raise Partly(sound, reasons)
        return sound

    return check


def each(kind: Kind, none: bool = False) -> Kind:
    """A mapping with values of one kind, or None if ``none`` is set."""

    def check(value: Any) -> dict[str, Any]:
        sound: dict[str, Any] = {}
        reasons = []
        for key, one in section(value).items():
            try:
                sound[key] = None if one is None and none else kind(one)
            except Partly as error:
                sound[key] = error.sound
                reasons += [f"{key}: {reason}" for reason in error.reasons]
            except ValueError as error:
                reasons.append(f"{key}: {error}")
        if reasons:
            raise Partly(sound, reasons)
        return sound

    return check


def list_of(kind: Kind) -> Kind:
    """A list of values of one kind."""
    members = each(kind)

    def check(value: Any) -> list[Any]:
        if not isinstance(value, list):
            raise ValueError(f"{short(value)} is not a list")
        try:
            return list(members({str(number): one for number, one in enumerate(value)}).values())
        except Partly as error:
            raise Partly(list(error.sound.values()), error.reasons) from None

    return check


def parse_object(data: bytes) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ValueError: it is none; says why.
    """
    try:
        text = data.decode("utf-8-sig")
        value = json.loads(text, parse_float=_float, parse_int=_int, parse_constant=_no_number)
        if "\\u" in text or "\\U" in text:
            value = plain(value, [MAX_VALUES])  # half of a surrogate pair is not text
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text (byte {error.start} is {byte_of(error)})") from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, " if error.lineno > 1 else ""
        what = (
            "it is empty"
            if not text.strip()
            else f"not JSON ({error.msg}: {where}column {error.colno})"
        )
        raise ValueError(what) from None
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    if not isinstance(value, dict):
        raise ValueError(f"{short(value)} is not a mapping of keys to values")
    return value


def _float(text: str) -> float | None:
    value = float(text)
    return value if math.isfinite(value) else None


def _int(text: str) -> int | None:
    return int(text) if len(text) <= _MAX_DIGITS else None


def _no_number(text: str) -> None:
    """NaN and Infinity."""


def plain(value: Any, left: list[int]) -> Any:
    """The same as plain values, which can be written as JSON and as UTF-8.

    Args:
        value: as parsed from YAML or JSON.
        left: number of values still allowed; counted down.

    Raises:
        ValueError: there are more.
    """
    left[0] -= 1
    if left[0] < 0:
        raise ValueError(f"it holds more than {MAX_VALUES:,} values")
    if isinstance(value, dict):
        return {_sound(str(key)): plain(one, left) for key, one in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(one, left) for one in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, int) and not isinstance(value, bool):
        return value if value.bit_length() <= 64 else None
    if value is None or isinstance(value, bool):
        return value
    return _sound(str(value))


def _sound(text: str) -> str:
    return text.encode("utf-8", "replace").decode("utf-8")


def byte_of(error: UnicodeDecodeError) -> str:
    """The byte that is not text, such as ``0xff``."""
    return f"0x{error.object[error.start]:02x}"


def short(value: object) -> str:
    """A value in a message; long ones are cut."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a whole number of more digits than Python writes
        text = f"a {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:57]}..."


# Names in the folder of a run that earlier versions wrote, and what they are called now.
RENAMED = {
    # a folder of a stage, and the file in it that lists the images
    "looks": "visualizations",
    "looks.json": "visualizations.json",
    # a key of result.json, of evaluation.json, and of `progress` in a checkpoint's state.json
    "verdict": "health",
    # a key of evaluation.json of a folder: which images were measured
    "pictures": "images",
}


def with_new_keys(value: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a file under the names of today, those of its section ``progress`` too.

    A value that has its new name already wins.
    """
    found: dict[str, Any] = {}
    for key, one in value.items():
        new = RENAMED.get(key, key)
        if new != key and new in value:
            continue
        is_progress = key == "progress" and isinstance(one, Mapping)
        found[new] = with_new_keys(one) if is_progress else one
    return found


def existing(folder: Path, name: str) -> Path:
    """``folder/name``, or what an earlier version called it if only that is there."""
    path = folder / name
    for old, new in RENAMED.items():
        if new == name and not path.exists() and (folder / old).exists():
            return folder / old
    return path


FEW = 1000


def caution_of(
    num_samples: int | None, num_reference: int | None, num_dims: int | None = None
) -> str | None:
    """Why a metric value is uncertain; None if it is not.

    Args:
        num_samples: number of generated images; None if unknown.
        num_reference: number of real images; None if the metric needs none.
        num_dims: dimensions of the features whose covariance is used; None for other metrics.
    """
    known = ((num_samples, "generated"), (num_reference, "real"))
    counts = [(num, what) for num, what in known if num is not None]
    few = [f"{num:,} {what}" for num, what in counts if num < FEW]
    said = []
    if few:
        said.append(f"from only {' and '.join(few)} images (fewer than {FEW:,})")
    short = [f"{num:,} {what}" for num, what in counts if num_dims is not None and num < num_dims]
    if short:
        said.append(
            f"from fewer images ({' and '.join(short)}) than its features have dimensions "
            f"({num_dims:,}): it is too high"
        )
    return "; ".join(said) or None


_FAVOURS = "it favours this run"


def trained_with(extractor: str) -> str:
    """The caution of a metric value whose feature extractor the run was trained with."""
    return f"{extractor} guided the training: {_FAVOURS}"


def favours(caution: str | None) -> bool:
    """Whether one of the cautions of a metric value is :func:`trained_with`."""
    return _FAVOURS in (caution or "")
