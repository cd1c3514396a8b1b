"""Find photos below a folder and decode them to upright RGB, or say why one cannot be used."""

from __future__ import annotations

import hashlib
import os
import re
import stat
import unicodedata
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError

from dinogen.errors import UserError

IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".tif", ".tiff", ".bmp", ".dib"}
)
_FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP")  # JPEG's plugin also opens phones' MPO
_PNG_END = b"IEND\xaeB`\x82"
_MAGIC = (b"\xff\xd8\xff", b"\x89PNG", b"RIFF", b"II*\x00", b"MM\x00*", b"BM")

# Pillow's own guard refuses a picture at a fixed size, and warns at half of it. Here the limit is
# the caller's max_pixels, checked from the header before anything is decoded.
Image.MAX_IMAGE_PIXELS = None

# It also warns of damaged tags, which say nothing about the pixels.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.TiffImagePlugin")

# https://www.cipa.jp/std/documents/e/DC-X008-Translation-2019-E.pdf, tag 0x0112
_TURN_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

_PLAIN_STEM = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}")
# What a stem must not look like, because keys of other photos, of further faces of a photo, and
# the files that stand beside the crops look like this.
_TAKEN_STEM = re.compile(r"(?i).*-[0-9a-f]{16}|.*_[1-9][0-9]*|settings|summary|rejected")


class PrepareError(UserError):
    """Photos cannot be prepared at all; the message names the folder or file and the mend."""


class Unusable(Exception):
    """One photo cannot be used.

    Attributes:
        reason: short code, one of ``unreadable``, ``empty``, ``not_an_image``, ``truncated``,
            ``corrupt``, ``too_large``, ``unsupported``.
        detail: what was found, for a person.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class Photo:
    """A file that may be a photo, by its suffix.

    Attributes:
        path: where it lies.
        source: its path relative to the folder searched, with ``/``; bytes of the name that are
            not UTF-8 are written as ``\\xNN``.
        key: unique name for its crops; see :func:`photo_key`.
    """

    path: Path
    source: str
    key: str


@dataclass(frozen=True)
class Photos:
    """What lies below a folder.

    Attributes:
        photos: files with an image suffix, and folders that cannot be used, sorted by path.
        num_ignored: number of files with another suffix.
    """

    photos: tuple[Photo, ...]
    num_ignored: int


def find_photos(src: Path) -> Photos:
    """List every file with an image suffix below ``src``, sorted by the bytes of its path.

    Links are followed; a folder reached twice is searched once. What has an image suffix but is
    no file, and a folder that may not be listed, are in the list too, so that reading them
    reports them.

    Raises:
        PrepareError: ``src`` is missing, is no folder, or has no file with an image suffix.
    """
    if not src.is_dir():
        what = "is not a folder" if src.exists() else "does not exist"
        raise PrepareError(f"{src}: {what}: give the folder that holds the photos")
    paths: list[Path] = []
    visited: set[str] = set()
    num_ignored = 0

    def unlistable(error: OSError) -> None:
        paths.append(Path(error.filename))

    for folder, folders, files in os.walk(src, onerror=unlistable, followlinks=True):
        real = os.path.realpath(folder)
        if real in visited:
            folders.clear()
            continue
        visited.add(real)
        folders.sort(key=os.fsencode)
        names = files + folders
        chosen = [name for name in names if Path(name).suffix.lower() in IMAGE_SUFFIXES]
        paths += [Path(folder, name) for name in chosen]
        num_ignored += len(set(files).difference(chosen))
    if not paths:
        others = f" ({num_ignored} files have another suffix)" if num_ignored else ""
        raise PrepareError(
            f"{src}: no photo below this folder{others}: give a folder with JPEG, PNG, WebP, TIFF "
            "or BMP files"
        )
    paths.sort(key=lambda path: os.fsencode(path.relative_to(src).as_posix()))
    return Photos(tuple(_photo(path, src) for path in paths), num_ignored)


def _photo(path: Path, src: Path) -> Photo:
    relative = path.relative_to(src).as_posix()
    source = os.fsencode(relative).decode("utf-8", "backslashreplace")
    return Photo(path, source, photo_key(relative))


def photo_key(relative: str) -> str:
    """The key of a photo from its relative path alone, whatever other photos there are.

    ``name.jpg`` directly in the folder searched keeps ``name`` if that is letters, digits, ``_``
    and ``-``. Every other path becomes such a name followed by ``-`` and 16 hex digits of the
    path's SHA-256, so ``a/x.jpg``, ``b/x.jpg`` and ``x.png`` differ.

    Args:
        relative: path relative to the folder searched, with ``/`` between its parts.

    Returns:
        ASCII letters, digits, ``_`` and ``-``; at most 100 characters.
    """
    stem, _, suffix = relative.rpartition(".")
    if suffix == "jpg" and _PLAIN_STEM.fullmatch(stem) and not _TAKEN_STEM.fullmatch(stem):
        return stem
    ascii_stem = unicodedata.normalize("NFKD", stem).encode("ascii", "ignore").decode()
    slug = re.sub(r"[^A-Za-z0-9_]+", "-", ascii_stem).strip("-_")[-80:].strip("-_") or "photo"
    return f"{slug}-{hashlib.sha256(os.fsencode(relative)).hexdigest()[:16]}"


def probe_photo(path: Path, max_pixels: int) -> tuple[int, int]:
    """Width and height in pixels as stored, from the header alone.

    Raises:
        Unusable: not a picture of a known format, unreadable, or more than ``max_pixels``.
    """
    with _open(path, max_pixels) as image:
        return image.size


def read_photo(path: Path, max_pixels: int) -> NDArray[np.uint8]:
    """Decode a photo to upright RGB.

    The EXIF rotation is applied, alpha is composited on white, 16-bit grey is scaled (not
    clipped), and of several frames the first is taken.

    Args:
        path: JPEG, PNG, WebP, TIFF or BMP, by its content.
        max_pixels: a photo with more pixels is refused before it is decoded.

    Returns:
        ``(H, W, 3)`` uint8.

    Raises:
        Unusable: with the reason; a photo whose data end early is never returned in part.
    """
    with _open(path, max_pixels) as image:
        try:
            image.load()
        except MemoryError:
            raise
        except Exception as error:  # Pillow's decoders raise nearly any type on damaged data
            reason = "truncated" if _says_truncated(error) else "corrupt"
            raise Unusable(reason, str(error) or type(error).__name__) from None
        # Pillow accepts a PNG that ends before its last chunk once every row is there.
        if image.format == "PNG" and _PNG_END not in path.read_bytes():
            raise Unusable("truncated", "no end marker")
        return _to_rgb(_upright(image))


def _open(path: Path, max_pixels: int) -> Image.Image:
    """Read the header; the pixels are read when they are asked for."""
    try:
        info = path.stat()
        if stat.S_ISDIR(info.st_mode):
            os.scandir(path).close()
            raise Unusable("unreadable", "a folder, not a file")
        # Opening a pipe would wait for ever.
        if not stat.S_ISREG(info.st_mode):
            raise Unusable("unreadable", "not a regular file")
        if info.st_size == 0:
            raise Unusable("empty", "0 bytes")
        with path.open("rb") as file:
            head = file.read(16)
    except OSError as error:
        raise Unusable("unreadable", str(error.strerror)) from None
    try:
        image = Image.open(path, formats=_FORMATS)
    except UnidentifiedImageError:
        if head.startswith(_MAGIC):
            raise Unusable("corrupt", "begins like a picture but has no usable header") from None
        raise Unusable(
            "not_an_image", f"no JPEG, PNG, WebP, TIFF or BMP: begins with {head[:8]!r}"
        ) from None
    except Exception as error:  # as in read_photo; headers too are decoded by the plugins
        # The WebP plugin decodes while it opens, and names no cause.
        cut_off = head[:4] == b"RIFF" and int.from_bytes(head[4:8], "little") + 8 > info.st_size
        reason = "truncated" if cut_off or _says_truncated(error) else "corrupt"
        raise Unusable(reason, str(error) or type(error).__name__) from None
    width, height = image.size
    if width * height > max_pixels:
        image.close()
        raise Unusable(
            "too_large", f"{width}x{height} = {width * height} pixels, allowed are {max_pixels}"
        )
    return image


def _says_truncated(error: Exception) -> bool:
    text = str(error).lower()
    return isinstance(error, EOFError) or any(
        word in text for word in ("truncated", "unexpected end", "end of file", "not enough")
    )


def _upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # damaged EXIF says nothing about rotation, and the pixels are whole
        return image
    turn = _TURN_UPRIGHT.get(orientation) if isinstance(orientation, int) else None
    return image if turn is None else image.transpose(turn)


def _to_rgb(image: Image.Image) -> NDArray[np.uint8]:
    if image.mode.startswith("I"):  # Pillow's own conversion would clip at 255
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise Unusable("unsupported", f"grey values {values.min()} to {values.max()}")
        grey = ((values * 255 + 32767) // 65535).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    elif image.mode not in ("1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr"):
        raise Unusable("unsupported", f"pixels of mode {image.mode} have no defined range")
    return np.asarray(image.convert("RGB"))
