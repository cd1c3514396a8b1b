"""What a file is that is named or stored like a plain tar but is none, and what to do with it."""

from __future__ import annotations

from pathlib import Path

# First bytes, what that is, and how it becomes a tar; {name} is the file's.
_UNPACK = "unpack it: `mv {name} {name}.%s && %s {name}.%s`"
_PACKED = (
    (b"\x1f\x8b", "compressed by gzip", _UNPACK % ("gz", "gunzip", "gz")),
    (b"BZh", "compressed by bzip2", _UNPACK % ("bz2", "bunzip2", "bz2")),
    (b"\xfd7zXZ\0", "compressed by xz", _UNPACK % ("xz", "unxz", "xz")),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd", _UNPACK % ("zst", "unzstd", "zst")),
    (b"\x04\x22\x4d\x18", "compressed by lz4", _UNPACK % ("lz4", "unlz4", "lz4")),
    (b"PK\x03\x04", "a zip archive", "unpack it, and make a tar with `tar --sort=name -cf`"),
    (b"PK\x05\x06", "an empty zip archive", "download it again"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it, and make a tar with `tar --sort=name -cf`"),
    (b"Rar!", "a rar archive", "unpack it, and make a tar with `tar --sort=name -cf`"),
    (b"PAR1", "a Parquet table", "make a tar of the images that it lists"),
    (b"\x89HDF", "an HDF5 file", "export its images, and make a tar of them"),
    (
        b"\xff\xd8\xff",
        "a JPEG image",
        "put images into a folder, and pack them with `dinogen pack`",
    ),
    (b"\x89PNG", "a PNG image", "put images into a folder, and pack them with `dinogen pack`"),
    (
        b"version https://git-lfs",
        "a pointer of Git LFS, not the file itself",
        "fetch the file: `git lfs pull`",
    ),
)
_SUFFIXES = {
    ".tar.gz": "gunzip",
    ".tgz": "gunzip",
    ".tar.bz2": "bunzip2",
    ".tbz2": "bunzip2",
    ".tar.xz": "unxz",
    ".txz": "unxz",
    ".tar.zst": "unzstd --rm",
    ".tzst": "unzstd --rm",
    ".tar.lz4": "unlz4 --rm",
}
_HEAD = 512


def what_it_is(path: Path) -> tuple[str, str] | None:
    """What a file is that does not begin like a tar, and the remedy; None if it is unknown.

    Raises:
        OSError: if it cannot be read.
    """
    with path.open("rb") as file:
        head = file.read(_HEAD)
    if not head:
        return "is empty", "download or make it again"
    for start, what, remedy in _PACKED:
        if head.startswith(start):
            return f"is {what}", remedy.format(name=path.name)
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<error")):
        return "is a web page or an error message of a server", "download it again"
    if text.startswith((b"{", b"[")) and text.isascii():
        return "is JSON", "download the tar itself"
    return None


def compressed_tars(folder: Path) -> list[str]:
    """Names of the compressed tars in a folder, sorted."""
    names = (path.name for path in folder.iterdir())
    return sorted(name for name in names if _tool(name) is not None and not name.startswith("."))


def unpack_advice(names: list[str]) -> str:
    """What to run for compressed tars; `names` has at least one."""
    tools: dict[str, str] = {}
    for name in names:
        suffix, tool = _tool(name) or ("", "")
        tools.setdefault(tool, suffix)
    commands = " and ".join(f"`{tool} *{suffix}`" for tool, suffix in tools.items())
    return f"samples are read at their offsets in the file, so unpack them: {commands}"


def _tool(name: str) -> tuple[str, str] | None:
    return next(((s, t) for s, t in _SUFFIXES.items() if name.lower().endswith(s)), None)
