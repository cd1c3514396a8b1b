"""Tars as other programs write them, with entries of every kind; and random damage to them."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import subprocess
import tarfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import webdataset
from webdataset.tariterators import tarfile_samples

from shards.format.sample import image_suffix, level_of_suffix
from shards.format.scan import survey

from .conftest import jpeg

Rng = np.random.Generator
WRITERS = {
    "gnu": ("gnu", "oldgnu", "v7", "ustar", "posix"),
    "bsdtar": ("ustar", "pax", "gnutar", "v7"),
    "tarfile": (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT),
    "webdataset": ("",),
}
_FOLDERS = ["", "", "", "./", "data/v1.5/", "Fotos äöü/", "a b/", "deep/" * 30, "x" * 90 + "/"]
_DTYPES = ["<f2", "<f4", "<f8", ">f2", ">f4", ">f8", "<i2", "|u1", "|b1"]


@dataclass
class Entry:
    """One entry of a tar to be: a file with its content, or something else under that name."""

    name: str
    content: bytes = b""
    kind: str = "file"
    link: str = ""


@cache
def images() -> list[tuple[str, bytes]]:
    """Small sound images, by suffix."""
    kinds = [("jpg", "JPEG"), ("jpeg", "JPEG"), ("JPG", "JPEG"), ("png", "PNG"), ("webp", "WEBP")]
    return [(suffix, jpeg(i, 16, kind)) for i, (suffix, kind) in enumerate(kinds)]


def tools() -> list[str]:
    """The writers that this machine has."""
    found = ["tarfile", "webdataset"]
    if shutil.which("tar") and b"GNU tar" in subprocess.check_output(["tar", "--version"]):
        found.append("gnu")
    if shutil.which("bsdtar"):
        found.append("bsdtar")
    return found


def draw_entries(rng: Rng, count: int, first: int = 0) -> list[Entry]:
    """Samples with random names and members, and between them what is no file."""
    entries: list[Entry] = []
    label = rng.integers(4)
    dtype = str(rng.choice(_DTYPES))
    for number in range(first, first + count):
        key = str(rng.choice(_FOLDERS)) + _stem(rng, number)
        suffix, image = images()[rng.integers(len(images()))]
        members = {suffix: image}
        if label == 1:
            members["json"] = json.dumps({"label": int(rng.integers(3)), "n": number}).encode()
        elif label == 2:
            members["cls"] = str(rng.integers(3)).encode()
        if rng.random() < 0.5:
            members["txt"] = b"a face, " * int(rng.integers(900))
        if label == 3:
            members["p4.npy"] = npy(rng, dtype)
        names = sorted(members)
        if rng.random() < 0.3:
            rng.shuffle(names)
        entries += [Entry(f"{key}.{name}", members[name]) for name in names]
        if rng.random() < 0.6:
            entries.append(_odd(rng, number, entries))
    return entries


def _stem(rng: Rng, number: int) -> str:
    ends = [
        "", " (1)", "ä", "\udce4\udcf6", "_" + "n" * int(rng.integers(60, 120)), "~", "@2x",
        "n" * 200, "'\"", "=", "\n", "\\", "%20", "中",
    ]  # fmt: skip
    return f"{number:04d}{rng.choice(ends)}"


def npy(rng: Rng, dtype: str) -> bytes:
    """Features (16, 3) of this dtype, in either order."""
    values = (rng.normal(size=(16, 3)) * 50 + 100).astype(dtype)
    file = io.BytesIO()
    np.save(file, np.asfortranarray(values) if rng.random() < 0.5 else values)
    return file.getvalue()


def _odd(rng: Rng, number: int, entries: list[Entry]) -> Entry:
    kind = str(rng.choice(["symlink", "hardlink", "fifo", "folder", "text", "hidden", "meta"]))
    name = f"odd{number}"
    if kind == "symlink":
        return Entry(f"{name}.jpg", kind=kind, link="/etc/passwd")
    if kind == "hardlink":
        # Written as a file where the format has no room for the name that it links to.
        target = entries[rng.integers(len(entries))].name
        return Entry(f"{name}.{target.rpartition('.')[2]}", kind=kind, link=target)
    if kind == "text":
        return Entry(f"README{number}.md", b"hello")
    if kind == "hidden":
        return Entry(f".hidden{number}", b"x" * 600)
    if kind == "meta":
        return Entry(f"__x{number}__", b"{}")
    return Entry(f"{name}_{kind}.d", kind=kind)


def write(rng: Rng, program: str, entries: list[Entry], path: Path) -> str:
    """Write a tar; returns how, in words."""
    form = WRITERS[program][rng.integers(len(WRITERS[program]))]
    if program == "webdataset":
        with webdataset.TarWriter(str(path)) as writer:
            for entry in entries:
                key, _, suffix = entry.name.rpartition("/")[2].partition(".")
                folder = entry.name.rpartition("/")[0]
                if entry.kind == "file" and key and suffix:
                    stem = f"{folder}/{key}" if folder or entry.name.startswith("/") else key
                    writer.write({"__key__": stem, suffix: entry.content})
        return program
    if program == "tarfile":
        with tarfile.open(path, "w", format=int(form)) as tar:
            for entry in entries:
                _add(rng, tar, entry)
        return f"{program} format {form}"
    return f"{program} {_by_command(rng, program, str(form), entries, path)}"


def _add(rng: Rng, tar: tarfile.TarFile, entry: Entry) -> None:
    kinds = {
        "file": tarfile.REGTYPE, "symlink": tarfile.SYMTYPE, "hardlink": tarfile.LNKTYPE,
        "fifo": tarfile.FIFOTYPE, "folder": tarfile.DIRTYPE,
    }  # fmt: skip
    info = tarfile.TarInfo(entry.name)
    info.type, info.linkname, info.size = kinds[entry.kind], entry.link, len(entry.content)
    info.mtime = rng.choice([0, 1.5]) if tar.format == tarfile.PAX_FORMAT else 1
    # Of a long name tarfile looks at the first 100 bytes, and takes those with "/" for a folder.
    if entry.kind == "file" and len(entry.name) < 100 and rng.random() < 0.2:
        info.type = (tarfile.AREGTYPE, tarfile.CONTTYPE)[rng.integers(2)]
    if entry.kind == "fifo":
        # What only some programs write: devices, labels, lists, kinds that nobody knows.
        info.type = [b"3", b"4", b"V", b"M", b"D", b"Z", b"N", b"6"][rng.integers(8)]
        info.size = 700 if info.type in (b"D", b"Z") else 0
        entry = Entry(entry.name, b"y" * info.size, "fifo")
    if tar.format == tarfile.PAX_FORMAT and rng.random() < 0.1:
        info.pax_headers = {"comment": "some words", "SCHILY.xattr.user.x": "\x01 =1"}
    if rng.random() < 0.1 and entry.kind == "file" and len(entry.name) < 90:
        _add_global(tar)
    # USTAR has no room for every name.
    with contextlib.suppress(ValueError, UnicodeError):
        tar.addfile(info, io.BytesIO(entry.content) if info.size else None)


def _add_global(tar: tarfile.TarFile) -> None:
    text = b"52 comment=0123456789abcdef0123456789abcdef01234567\n"
    info = tarfile.TarInfo("pax_global_header")
    info.type, info.size = tarfile.XGLTYPE, len(text)
    tar.fileobj.write(info.tobuf(tarfile.USTAR_FORMAT))
    tar.fileobj.write(text.ljust(512, b"\0"))
    tar.offset += 1024


def _by_command(rng: Rng, program: str, form: str, entries: list[Entry], path: Path) -> str:
    folder = path.with_suffix(".tree")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    names = []
    for entry in entries:
        place = folder / entry.name
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            _put(rng, folder, place, entry)
        except OSError:
            continue
        names.append(entry.name)
    listed = path.with_suffix(".list")
    listed.write_bytes(b"\0".join(os.fsencode(name) for name in names) + b"\0")
    options = [f"--format={form}"]
    if program == "gnu":
        options += ["-S"] if rng.random() < 0.5 and form not in ("v7", "ustar") else []
        options += ["-V", "a label"] if rng.random() < 0.3 and "gnu" in form else []
        options += ["-b1"] if rng.random() < 0.2 else []
        options += ["--null", "--verbatim-files-from", "--no-recursion"]
        command = ["tar", *options, "-C", folder, "-T", listed, "-cPf", path]
    else:
        options += ["-n", "--null"]
        command = ["bsdtar", *options, "-C", folder, "-T", listed, "-cPf", path]
    environment = {**os.environ, "LC_ALL": "C.UTF-8", "TAR_OPTIONS": ""}
    # Names that a format has no room for are left out, with a warning and rc 1 or 2.
    subprocess.run(command, check=False, capture_output=True, env=environment)
    shutil.rmtree(folder)
    return " ".join(options)


def _put(rng: Rng, folder: Path, place: Path, entry: Entry) -> None:
    if entry.kind == "file":
        place.write_bytes(entry.content)
        if place.suffix == ".txt" and len(entry.content) > 5000 and rng.random() < 0.5:
            # A hole, which GNU tar -S does not store.
            with place.open("r+b") as file:
                file.truncate(40_000)
                file.seek(60_000)
                file.write(b"end")
    elif entry.kind == "symlink":
        place.symlink_to(entry.link)
    elif entry.kind == "hardlink":
        os.link(folder / entry.link, place)
    elif entry.kind == "fifo":
        os.mkfifo(place)
    else:
        place.mkdir()


Members = tuple[str, dict[str, object]]


def by_webdataset(path: Path) -> list[Members]:
    """Samples with an image or features, as webdataset reads them; levels as plain lists."""
    found = []
    for sample in tarfile_samples([{"url": str(path)}]):
        members = {k: v for k, v in sample.items() if not k.startswith("__")}
        names = list(members)
        if image_suffix(names) is None and not any(map(level_of_suffix, names)):
            continue
        for name, data in members.items():
            if level_of_suffix(name):
                values = np.load(io.BytesIO(data))
                wide = values.dtype.itemsize != 2 or values.dtype.kind != "f"
                members[name] = values.astype("<f4" if wide else "<f2").tolist()
        found.append((sample["__key__"], members))
    return found


def by_dinogen(path: Path) -> list[Members]:
    """The same by the index of dinogen."""
    from shards.read.reader import read_member

    index = survey(path, with_sums=True).index
    found: list[Members] = []
    if index is None:
        return found
    with path.open("rb") as file:
        for row in range(len(index)):
            members: dict[str, object] = {}
            for number, column in enumerate(index.columns):
                if index.offsets[row, number] != -1:
                    data = read_member(index, row, number, path.name, file.fileno())
                    members[column.suffix] = data.tolist() if column.shape else data
            found.append((index.key(row), members))
    return found


def damage(rng: Rng, data: bytes) -> tuple[bytes, str]:
    """The bytes of a tar after some mishap, and what that was."""
    kind = str(rng.choice(["flip", "flips", "zero", "cut", "insert", "delete", "noise", "swap"]))
    changed = bytearray(data)
    at = int(rng.integers(len(data)))
    if rng.random() < 0.5:
        at -= at % 512
    length = int(rng.choice([1, 7, 512, 512, 1024, 3000, 5120]))
    if kind in ("flip", "flips"):
        for place in [at] if kind == "flip" else rng.integers(len(data), size=5).tolist():
            changed[place] ^= 1 << int(rng.integers(8))
    elif kind == "zero":
        changed[at : at + length] = bytes(len(changed[at : at + length]))
    elif kind == "cut":
        del changed[at:]
    elif kind == "insert":
        changed[at:at] = rng.bytes(length) if rng.random() < 0.5 else bytes(length)
    elif kind == "delete":
        del changed[at : at + length]
    elif kind == "noise":
        changed[at : at + length] = rng.bytes(len(changed[at : at + length]))
    else:
        other = int(rng.integers(len(data) // 512)) * 512
        at -= at % 512
        changed[at : at + 512], changed[other : other + 512] = (
            changed[other : other + 512], changed[at : at + 512],
        )  # fmt: skip
    return bytes(changed), f"{kind} of {length} at {at}"


def skip_without(program: str) -> None:
    """Skip a test where the program is not installed."""
    if program not in tools():
        pytest.skip(f"{program} is not installed")
