"""The members of a sample: how they are named, encoded and decoded. Only this file knows."""

from __future__ import annotations

import io
import json
import math
import re
import tokenize
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from shards.errors import show_name
from shards.files import NPY_HEADERS

# The first of them that a sample has is its image.
IMAGE_SUFFIXES = {"jpg": "jpg", "jpeg": "jpg", "png": "png", "webp": "webp"}
META_SUFFIX = "json"
# A class number in ASCII, as WebDataset decodes it.
LABEL_SUFFIX = "cls"
LABEL_SUFFIXES = (META_SUFFIX, LABEL_SUFFIX)
CAPTION_SUFFIX = "txt"
# Levels that hold one vector of a sample: the embeddings of its image and of its caption.
VECTORS = ("clip", "text")
# Of the main guide's features of mirrored images; those of NAME are NAME_flipped.
FLIPPED = "flipped"
# In a guide's place, an autoencoder: means and log variances of the image, and of its mirror image.
LATENTS = "latents"
OF_LATENTS = (LATENTS, f"{LATENTS}_{FLIPPED}")
_LEVEL = re.compile(r"(?:([a-z][a-z0-9_]*)\.)?[pn]([1-9][0-9]*)")
# WebDataset's rule: up to the first dot of the last part of the name; what it treats as metadata
# of the tar itself is skipped.
_NAME = re.compile(r"((?:.*/)?[^.]+)\.([^/]*)")
_PASSED_OVER = re.compile(r"__[^/]*__(?:/|$)")
# What numpy raises for a damaged header of a .npy, which it hands to Python's own parser.
_NPY_ERRORS = (
    ValueError, KeyError, TypeError, SyntaxError, tokenize.TokenError, OverflowError, EOFError,
    MemoryError, RecursionError,
)  # fmt: skip
_NUMBERS = "fiub"
# The square of a larger number, and so a variance, does not fit into float32.
_LARGEST = 1e18
# What a JSON text may be instead of an object.
_KINDS = {
    list: "a list", str: "a string", int: "a number", float: "a number", bool: "true or false",
    type(None): "null",
}  # fmt: skip


@dataclass(frozen=True)
class Sample:
    """One training example as it is stored on disk.

    Attributes:
        key: unique name, of any length; see :func:`check_key`.
        image: the encoded image file, stored as it is.
        image_format: "jpg", "png" or "webp".
        meta: free JSON object (`label` is reserved).
        levels: features by level, {"p4": (16, C), "p8": (64, C), "p16": (256, C)}: `p` pooled,
            `n` native, the number is the grid's side; "NAME.p4" are those of a further guide.
            "clip" and "text" are (1, E): embeddings of the image and of the caption, zeros if
            there is no caption. Stored as float16.
        label: class number, or None.
        caption: a description of the image, or None.

    Raises:
        ValueError: naming the key and what is wrong with it.
    """

    key: str
    image: bytes
    image_format: str
    meta: dict[str, Any] = field(default_factory=dict)
    levels: dict[str, npt.NDArray[Any]] = field(default_factory=dict)
    label: int | None = None
    caption: str | None = None

    def __post_init__(self) -> None:
        check_key(self.key)
        if self.image_format not in IMAGE_SUFFIXES.values():
            raise ValueError(
                f"{show_name(self.key)}: image_format {self.image_format!r} is not jpg, png or webp"
            )
        if "label" in self.meta:
            raise ValueError(
                f"{show_name(self.key)}: give the label as Sample.label, not inside meta"
            )
        for name, values in self.levels.items():
            places = level_grid(name) ** 2
            if values.ndim != 2 or values.shape[0] != places or values.shape[1] < 1:
                raise ValueError(
                    f"{show_name(self.key)}: level {name} has shape {values.shape}, expected "
                    f"({places}, C)"
                )


def split_name(name: str) -> tuple[str, str] | None:
    """Key and suffix of a member of a tar, as WebDataset splits its name.

    The folders are part of the key: `a/v1.5/x.p4.npy` is `p4.npy` of `a/v1.5/x`. Suffixes are
    lower case.

    Returns:
        None for a name that is no member of a sample: without a dot, of a hidden file, or `__x__`.
    """
    found = _NAME.fullmatch(name)
    if found is None or _PASSED_OVER.match(name):
        return None
    return found[1], found[2].lower()


def check_key(key: str) -> None:
    """Raise ValueError unless what WebDataset reads back is this key.

    The same rule holds for samples that are written and that are read: any length, any folders,
    no dot in the last part.
    """
    if split_name(f"{key}.jpg") != (key, "jpg"):
        raise ValueError(
            f"key '{show_name(key)}' is not a valid name of a sample: it must not be empty, its "
            "last part must not contain '.', and it must not begin with a folder '__x__'; "
            "WebDataset would split or skip it"
        )


def level_name(level: int | str) -> str:
    """Name of a level: 4 means "p4", names are unchanged.

    Raises:
        ValueError: if it is not the name of a level.
    """
    name = f"p{level}" if isinstance(level, int) else level
    if not _is_level(name):
        raise ValueError(
            f"{level!r} is not the name of a level; levels are p4, p8, p16 or n4, n8, n16, NAME.p4 "
            "of a further guide, clip and text"
        )
    return name


def level_grid(name: str) -> int:
    """Side of the grid of a level: 4 for "p4", 1 for a vector."""
    found = _LEVEL.fullmatch(level_name(name))
    return int(found[2]) if found else 1


def level_guide(name: str) -> str:
    """Name of the guide that made a level: "pixels" for "pixels.p4", "" for the main guide.

    The vectors "clip" and "text" both come from "clip".
    """
    found = _LEVEL.fullmatch(level_name(name))
    return (found[1] or "") if found else VECTORS[0]


def flipped_guide(name: str) -> str:
    """The name under which shards hold a guide's features of mirrored images; "" is the main one.

    It is a guide's name like others, so that readers of any version read these levels.
    """
    return f"{name}_{FLIPPED}" if name else FLIPPED


def flipped_level(name: str) -> str:
    """The same level of the mirrored image: "flipped.p4" for "p4", "pixels_flipped.p4"."""
    return f"{flipped_guide(level_guide(name))}.{name.rpartition('.')[2]}"


def is_flipped_guide(name: str) -> bool:
    """Whether a guide's name is one of :func:`flipped_guide`."""
    return name.rpartition("_")[2] == FLIPPED


def is_flipped(name: str) -> bool:
    """Whether a level is that of mirrored images."""
    return is_flipped_guide(level_guide(name))


def _is_level(name: str) -> bool:
    found = _LEVEL.fullmatch(name)
    return name in VECTORS or (found is not None and found[1] not in VECTORS)


def level_of_suffix(suffix: str) -> str | None:
    """Level held by the member with this suffix ("p4.npy" gives "p4"), or None."""
    name, dot, kind = suffix.rpartition(".")
    return name if dot and kind == "npy" and _is_level(name) else None


def level_suffix(name: str) -> str:
    """Suffix of the member that holds a level: "p4.npy" for "p4"."""
    return f"{name}.npy"


def image_suffix(suffixes: Sequence[str]) -> str | None:
    """The image among the suffixes of a sample, or None."""
    return next((s for s in IMAGE_SUFFIXES if s in suffixes), None)


def encode(sample: Sample) -> dict[str, bytes]:
    """Members of a sample by suffix, in the order in which they are written.

    Raises:
        ValueError: if features are not finite in float16, or meta is not JSON.
    """
    meta = dict(sample.meta)
    if sample.label is not None:
        meta["label"] = int(sample.label)
    try:
        text = json.dumps(
            meta, sort_keys=True, ensure_ascii=False, allow_nan=False, separators=(",", ":")
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"{show_name(sample.key)}: meta is not JSON: {error}") from error
    members = {sample.image_format: sample.image, META_SUFFIX: text.encode()}
    if sample.caption is not None:
        members[CAPTION_SUFFIX] = sample.caption.encode()
    for name, values in sample.levels.items():
        members[level_suffix(name)] = encode_npy(to_float16(sample.key, name, values))
    return dict(sorted(members.items()))


def decode(key: str, members: Mapping[str, bytes]) -> Sample:
    """The sample that `encode` turned into these members; unknown members are left alone.

    Raises:
        ValueError: naming the key and the member that cannot be decoded.
    """
    suffix = image_suffix(list(members))
    if suffix is None:
        kinds = ", ".join(map(show_name, members))
        raise ValueError(f"{show_name(key)}: has no image; its members are {kinds}")
    meta = decode_meta(members.get(META_SUFFIX, b"{}"), key)
    label = meta.pop("label", None)
    if label is None and LABEL_SUFFIX in members:
        label = decode_label(members[LABEL_SUFFIX], key)
    levels = {
        name: as_level(name, decode_npy(data, f"{key}.{member}"))
        for member, data in members.items()
        if (name := level_of_suffix(member))
    }
    # Tars from elsewhere may hold text in any encoding; a lost letter does no harm.
    words = members.get(CAPTION_SUFFIX)
    caption = None if words is None else bytes(words).decode("utf-8", "replace")
    image = bytes(members[suffix])
    return Sample(key, image, IMAGE_SUFFIXES[suffix], meta, levels, label, caption)


def as_level(name: str, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """An array as a level; other programs write a vector (E,), here it is (1, E)."""
    return values[None] if name in VECTORS and values.ndim == 1 else values


def decode_meta(data: bytes, key: str) -> dict[str, Any]:
    """The JSON object of a sample.

    Raises:
        ValueError: if it is no JSON object, or its `label` is not an integer of 64 bits.
    """
    name = show_name(f"{key}.{META_SUFFIX}")
    if not data.strip():
        raise ValueError(f"{name}: is empty, expected a JSON object")
    try:
        meta = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name}: not JSON: {error}") from error
    if not isinstance(meta, dict):
        raise ValueError(f"{name}: holds {_KINDS[type(meta)]}, expected an object")
    label = meta.get("label")
    if label is not None and (isinstance(label, bool) or not isinstance(label, int)):
        raise ValueError(f"{name}: label {label!r:.80} is not an integer")
    if label is not None and not -(2**63) < label < 2**63:
        raise ValueError(f"{name}: label {label!r:.80} does not fit into 64 bits")
    return meta


def decode_label(data: bytes, key: str) -> int:
    """The class number in a `.cls` member.

    Raises:
        ValueError: if it is not an integer of 64 bits in ASCII.
    """
    text = bytes(data).strip()
    if not re.fullmatch(rb"[+-]?[0-9]{1,18}", text):
        name, shown = show_name(f"{key}.{LABEL_SUFFIX}"), text[:40].decode("utf-8", "replace")
        raise ValueError(f"{name}: {shown!r} is not an integer")
    return int(text)


def to_float16(key: str, name: str, values: npt.NDArray[Any]) -> npt.NDArray[np.float16]:
    """Features as contiguous float16.

    Raises:
        ValueError: if any of them is not finite, or too large for float16 (65504).
    """
    with np.errstate(over="ignore"):
        small = np.ascontiguousarray(values, dtype=np.float16)
    if not np.isfinite(small).all():
        worst = np.abs(values.astype(np.float64)).max()
        raise ValueError(
            f"{show_name(key)}: level {name} is not finite in float16 (largest magnitude {worst}, "
            f"the limit is 65504): check the guide, or scale its features"
        )
    return small


def encode_npy(array: npt.NDArray[Any]) -> bytes:
    """A .npy file whose payload begins at byte 128, aligned for reading without a copy."""
    file = io.BytesIO()
    np.lib.format.write_array(file, array, version=(1, 0), allow_pickle=False)
    return file.getvalue()


def npy_header(data: bytes, name: str) -> tuple[tuple[int, ...], np.dtype[Any], bool, int]:
    """Shape, dtype, whether in Fortran order, and header length of a .npy file.

    Args:
        data: its first bytes.
        name: of the file, for the error.

    Raises:
        ValueError: if it is no npy file of numbers (floating-point, integer or boolean).
    """
    file, name = io.BytesIO(data), show_name(name)
    try:
        version = np.lib.format.read_magic(file)
        read = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[version]
        with NPY_HEADERS:
            shape, fortran, dtype = read(file)
    except _NPY_ERRORS as error:
        raise ValueError(f"{name}: not a .npy file: {error!s:.200}") from error
    if dtype.kind not in _NUMBERS:
        raise ValueError(f"{name}: holds {dtype!s:.80}, expected numbers")
    if any(isinstance(length, bool) or length < 0 for length in shape):
        raise ValueError(f"{name}: not a .npy file: its shape is {shape}")
    return shape, dtype, bool(fortran), file.tell()


def decode_npy(data: bytes, name: str) -> npt.NDArray[Any]:
    """Array of a .npy file as a read-only view of `data`.

    Raises:
        ValueError: as `npy_header`, or if the length does not fit the shape.
    """
    shape, dtype, fortran, header = npy_header(data, name)
    if len(data) - header != math.prod(shape) * dtype.itemsize:
        raise ValueError(
            f"{show_name(name)}: {len(data) - header} bytes do not fit {shape} {dtype}"
        )
    return as_array(data[header:], dtype, shape, fortran)


def as_array(
    payload: bytes | memoryview, dtype: np.dtype[Any], shape: tuple[int, ...], fortran: bool
) -> npt.NDArray[Any]:
    """What follows the header of a .npy, as an array."""
    values = np.frombuffer(payload, dtype)
    return values.reshape(shape[::-1]).T if fortran else values.reshape(shape)


def unusable(values: npt.NDArray[Any], dtype: str) -> str | None:
    """What is wrong with the numbers of a level when they are read as `dtype`, or None."""
    with np.errstate(over="ignore", invalid="ignore"):
        converted = values.astype(dtype)
        if not np.isfinite(converted).all():
            return f"holds numbers that are not finite as {np.dtype(dtype)}"
        if np.abs(converted).max(initial=0) > _LARGEST:
            return f"holds numbers beyond {_LARGEST:g}"
    return None
