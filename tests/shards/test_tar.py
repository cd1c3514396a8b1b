"""Damaged and hostile headers of a tar end the walk with an error, never with a hang."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from shards.format.tar import BLOCK, Member, TarError, walk


def walked(path: Path, data: bytes) -> list[Member]:
    path.write_bytes(data)
    with path.open("rb") as file:
        return list(walk(file.fileno()))


def tar_with(kind: bytes, content: bytes) -> bytes:
    """A header of this type with its content, then one plain file."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        special = tarfile.TarInfo("special")
        special.type, special.size = kind, len(content)
        tar.addfile(special, io.BytesIO(content))
        plain = tarfile.TarInfo("a.json")
        plain.size = 2
        tar.addfile(plain, io.BytesIO(b"{}"))
    return out.getvalue()


@pytest.mark.parametrize(
    "record",
    [
        b"0 path=x\n",
        b"garbage",
        b"-9 path=x\n",
        b" 9 path=x\n",
        b"1 ",
        b"99 path=x\n",
        b"9" * 5000 + b" path=x\n",
        b"12 path=xyz\nrest",
    ],
)
def test_damaged_pax_records_are_refused(tmp_path: Path, record: bytes):
    with pytest.raises(TarError, match="the PAX header is damaged at byte 0"):
        walked(tmp_path / "x.tar", tar_with(b"x", record))


def test_sound_pax_records_name_the_next_file(tmp_path: Path):
    record = b"11 mtime=1\n" + b"15 path=b.json\n"
    (member,) = walked(tmp_path / "x.tar", tar_with(b"x", record))
    assert (member.name, member.head) == ("b.json", b"{}")


def test_a_negative_size_is_refused(tmp_path: Path):
    data = bytearray(tar_with(b"0", b""))
    # The second header would send the walk back to the first, for ever.
    header = data[BLOCK : 2 * BLOCK]
    header[124:136] = b"-2000".ljust(12, b"\0")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    data[BLOCK : 2 * BLOCK] = header
    with pytest.raises(TarError, match=r"negative\) at byte 512"):
        walked(tmp_path / "x.tar", bytes(data))
