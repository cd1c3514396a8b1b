"""Kinds of files by suffix and content: which are read as images, and what to do with others."""

from __future__ import annotations

import re
from dataclasses import dataclass

from PIL import features

try:
    from pillow_heif import register_heif_opener
except ImportError:
    _READS_HEIC = False
else:
    register_heif_opener()
    _READS_HEIC = True


@dataclass(frozen=True)
class Kind:
    """A kind of file.

    Attributes:
        name: for messages, with an article unless it is a proper name.
        suffixes: in lower case, with the dot.
        plugin: the Pillow format that reads it on this machine, or "" if none does.
        remedy: what to do with such a file if it is not read.
    """

    name: str
    suffixes: tuple[str, ...]
    plugin: str = ""
    remedy: str = ""


JPEG = Kind("JPEG", (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"), "JPEG")  # its plugin opens MPO
PNG = Kind("PNG", (".png", ".apng"), "PNG")
WEBP = Kind("WebP", (".webp",), "WEBP")
HEIC = Kind(
    "HEIC",
    (".heic", ".heif", ".hif"),
    "HEIF" if _READS_HEIC else "",
    "install pillow-heif (`pip install pillow-heif`), or convert to JPEG",
)
AVIF = Kind(
    "AVIF",
    (".avif",),
    "AVIF" if features.check("avif") else "",
    "install Pillow 11.3 or newer, or convert to JPEG",
)
# Only these plugins are allowed: the EPS plugin, for example, would pass bytes to Ghostscript.
_READ = (
    JPEG,
    PNG,
    WEBP,
    Kind("TIFF", (".tif", ".tiff"), "TIFF"),
    Kind("BMP", (".bmp", ".dib"), "BMP"),
    Kind("GIF", (".gif",), "GIF"),
    Kind("PPM", (".ppm", ".pgm", ".pbm", ".pnm"), "PPM"),
    Kind(
        "JPEG 2000",
        (".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx"),
        "JPEG2000" if features.check("jpg_2000") else "",
        "install a Pillow that has OpenJPEG, or convert to PNG",
    ),
    HEIC,
    AVIF,
)
JXL = Kind("JPEG XL", (".jxl",), "", "convert to PNG or JPEG, for example with djxl")
RAW = Kind(
    "a camera raw file",
    (
        *(".3fr", ".arw", ".cr2", ".cr3", ".crw", ".dcr", ".dng", ".erf", ".iiq", ".kdc", ".mef"),
        *(".mos", ".mrw", ".nef", ".nrw", ".orf", ".pef", ".raf", ".raw", ".rw2", ".rwl", ".sr2"),
        *(".srf", ".srw", ".x3f"),
    ),
    "",
    "convert to JPEG or TIFF, for example with darktable-cli",
)
VIDEO = Kind(
    "a video",
    (
        *(".3gp", ".avi", ".flv", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".webm"),
        *(".wmv",),
    ),
    "",
    "extract frames, for example with `ffmpeg -i FILE %05d.png`",
)
ARCHIVE = Kind(
    "an archive",
    (".7z", ".bz2", ".gz", ".rar", ".tar", ".tbz2", ".tgz", ".txz", ".xz", ".zip", ".zst"),
    "",
    "unpack it",
)
DESIGN = Kind(
    "a file of a drawing program", (".ai", ".kra", ".psb", ".psd", ".xcf"), "", "export it as PNG"
)
VECTOR = Kind("a vector drawing", (".eps", ".ps", ".svg", ".svgz"), "", "render it to PNG")
PDF = Kind("a PDF", (".pdf",), "", "extract its images, for example with `pdfimages -all`")
TEXT = Kind("a page of text", (".htm", ".html"), "", "get the image itself")
LFS = Kind("a Git LFS pointer", (), "", "run `git lfs pull` in its repository")
APPLE_DOUBLE = Kind("a macOS metadata file", (), "", "delete it: it holds no image")
UNFINISHED = Kind(
    "an unfinished download", (".crdownload", ".icloud", ".part"), "", "get the whole file"
)
HDR = Kind(
    "a high dynamic range image",
    (".exr", ".hdr", ".pfm"),
    "",
    "tone-map it to 8 or 16 bits and save it as PNG",
)
OTHER = Kind("an image of another kind", (".ico", ".jxr", ".pcx", ".tga"), "", "convert to PNG")
_UNREAD = (
    *(JXL, RAW, HDR, OTHER, VIDEO, ARCHIVE, DESIGN, VECTOR, PDF, TEXT, UNFINISHED),
    Kind("medical data", (".dcm", ".nii"), "", "choose a window of grey values, save it as PNG"),
    Kind("an array", (".h5", ".mat", ".npy", ".npz"), "", "save its images as PNG"),
    Kind("a database", (".lmdb", ".mdb", ".parquet", ".tfrecord"), "", "export its images as PNG"),
)

KINDS = (*_READ, *_UNREAD)
# What is found in place of images, and has no pixels of its own.
NO_IMAGES = (VIDEO, ARCHIVE, PDF, TEXT, LFS, APPLE_DOUBLE, UNFINISHED)
# The only formats that Pillow may open.
PLUGINS = tuple(kind.plugin for kind in _READ if kind.plugin)
# Suffixes of the files that are read on this machine.
IMAGE_SUFFIXES = frozenset(suffix for kind in _READ if kind.plugin for suffix in kind.suffixes)
# What to do with files that hold images but are not read on this machine, by suffix.
UNREAD = {suffix: kind.remedy for kind in KINDS if not kind.plugin for suffix in kind.suffixes}
# Those of them that can be nothing but images.
UNREAD_IMAGES = frozenset(
    suffix for kind in (*_READ, JXL, RAW, HDR, OTHER) if not kind.plugin for suffix in kind.suffixes
)

_BMP_HEADERS = (12, 16, 40, 52, 56, 64, 108, 124)  # their lengths
_BRANDS = {b"avif": AVIF, b"avis": AVIF, b"crx ": RAW}
_BRANDS |= dict.fromkeys((b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx"), HEIC)
_BY_NAME = {kind.name: kind for kind in _READ}
_MAGIC = (
    (b"\xff\xd8\xff", JPEG),
    (b"\x89PNG\r\n\x1a\n", PNG),
    (b"II*\x00\x10\x00\x00\x00CR", RAW),
    (b"II*\x00", _BY_NAME["TIFF"]),
    (b"MM\x00*", _BY_NAME["TIFF"]),
    (b"II+\x00", _BY_NAME["TIFF"]),
    (b"MM\x00+", _BY_NAME["TIFF"]),
    (b"GIF8", _BY_NAME["GIF"]),
    (b"\x00\x00\x00\x0cjP  \r\n", _BY_NAME["JPEG 2000"]),
    (b"\xff\x4f\xff\x51", _BY_NAME["JPEG 2000"]),
    (b"\xff\x0a", JXL),
    (b"\x00\x00\x00\x0cJXL ", JXL),
    (b"IIRO", RAW),
    (b"IIRS", RAW),
    (b"IIU\x00", RAW),
    (b"FUJIFILMCCD-RAW", RAW),
    (b"8BPS", DESIGN),
    (b"gimp xcf", DESIGN),
    (b"%PDF", PDF),
    (b"%!PS", VECTOR),
    (b"PK\x03\x04", ARCHIVE),
    (b"PK\x05\x06", ARCHIVE),
    (b"Rar!", ARCHIVE),
    (b"7z\xbc\xaf\x27\x1c", ARCHIVE),
    (b"\x1f\x8b", ARCHIVE),
    (b"BZh", ARCHIVE),
    (b"\xfd7zXZ\x00", ARCHIVE),
    (b"\x28\xb5\x2f\xfd", ARCHIVE),
    (b"\x1aE\xdf\xa3", VIDEO),
    (b"FLV\x01", VIDEO),
    (b"version https://git-lfs", LFS),
    (b"\x00\x05\x16\x07", APPLE_DOUBLE),
    (b"\x00\x05\x16\x00", APPLE_DOUBLE),
)
_SVG = re.compile(rb"(?:\xef\xbb\xbf)?\s*(?:<\?xml[^>]*>\s*)?(?:<!--.*?-->\s*)*<svg[\s>]", re.S)
_HTML = re.compile(rb"(?i)(?:\xef\xbb\xbf)?\s*<(?:!doctype html|html|head|script)\b")

# Files and folders that systems and programs create beside those of the user, in lower case.
_SYSTEM = frozenset(
    {
        *("@eadir", "@recently-snapshot", "@recycle", "@sharebin", "@tmp", "#recycle", "#snapshot"),
        *("$recycle.bin", "recycler", "system volume information", "thumbs.db", "ehthumbs.db"),
        *("ehthumbs_vista.db", "desktop.ini", "folder.htt", "lost+found", "__macosx", "icon\r"),
        *("network trash folder", "temporary items", "thumbs.db:encryptable", "~snapshot"),
        *("picasa.ini", "zbthumbnail.info"),
    }
)
# Streams of a file that file systems without streams show as separate files.
_STREAMS = (":zone.identifier", "@synoeastream", "@synoresource")


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name belongs to a system or program and not to the user.

    Names that begin with a dot do (``.git``, ``._a.jpg`` of macOS, ``.ipynb_checkpoints``,
    ``.thumbnails``, ``.Trash-1000``), and those that NAS boxes, Windows and macOS reserve.
    """
    low = name.lower()
    return low.startswith(".") or low in _SYSTEM or low.endswith(_STREAMS)


def kind_of(head: bytes) -> Kind | None:
    """The kind of a file by its first 64 bytes or more; None if it is unknown."""
    for magic, kind in _MAGIC:
        if head.startswith(magic):
            return kind
    if head[:4] == b"RIFF":
        return {b"WEBP": WEBP, b"AVI ": VIDEO}.get(head[8:12])
    if head[4:8] == b"ftyp":
        return _of_brands(head)
    if head[:2] == b"BM" and int.from_bytes(head[14:18], "little") in _BMP_HEADERS:
        return _BY_NAME["BMP"]
    if head[:1] == b"P" and head[1:2] in b"123456" and head[2:3] in b" \t\r\n#":
        return _BY_NAME["PPM"]
    if head[257:262] == b"ustar":
        return ARCHIVE
    if _SVG.match(head):
        return VECTOR
    return TEXT if _HTML.match(head) else None


def _of_brands(head: bytes) -> Kind:
    """Kind of a file of ISO boxes: its own brand, else the first known compatible brand."""
    end = min(int.from_bytes(head[:4], "big"), len(head))
    for place in (8, *range(16, end - 3, 4)):
        if kind := _BRANDS.get(head[place : place + 4]):
            return kind
    return HEIC if head[8:12] in (b"mif1", b"msf1") else VIDEO
