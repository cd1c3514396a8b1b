"""One shard on disk: the tar by webdataset's writer, always the same bytes, and its index."""

from __future__ import annotations

import contextlib
import io
import tarfile
from collections.abc import Iterable
from pathlib import Path

from shards import index as index_files
from shards.files import AtomicFile
from shards.index import ShardIndex
from shards.manifest import ShardInfo
from shards.scan import scan


class ShardWriter:
    """Writes the samples of one shard to a temporary file, which `finish` puts in place.

    Args:
        path: where the tar is written.
        split: what the manifest calls the samples.
    """

    def __init__(self, path: Path, split: str) -> None:
        from webdataset import TarWriter

        self._path, self._split = path, split
        self._file = AtomicFile(path)
        self._tar = TarWriter(
            self._file,
            encoder=False,
            compress=False,
            mtime=0,
            user="dinogen",
            group="dinogen",
            mode=0o444,
        )
        self.num_samples = 0

    def write(self, key: str, members: dict[str, bytes]) -> None:
        """Append one sample; the writer sorts its members by suffix."""
        if "\0" in key or any("\0" in suffix for suffix in members):
            self._write_with_zeros(key, members)
        else:
            self._tar.write({"__key__": key, **members})
        self.num_samples += 1

    def _write_with_zeros(self, key: str, members: dict[str, bytes]) -> None:
        """As webdataset's writer, for names that a plain header would cut at a zero byte."""
        for suffix, data in sorted(members.items()):
            name = f"{key}.{suffix}"
            info = tarfile.TarInfo(name.replace("\0", "_"))
            info.size, info.mtime, info.mode = len(data), 0, 0o444
            info.uname = info.gname = "dinogen"
            info.pax_headers = {"path": name}
            self._tar.tarstream.addfile(info, io.BytesIO(data))

    def finish(self) -> tuple[ShardInfo, ShardIndex]:
        """Put the tar and its index in place.

        Returns:
            What the manifest says about the shard, and the index.
        """
        self._tar.close()
        self._file.commit()
        # Read back from what was written: no second way to compute an offset.
        index = scan(self._path, with_sums=True)
        index_files.save(index, self._path.with_name(index_files.index_name(self._path.name)))
        info = ShardInfo(
            name=self._path.name,
            split=self._split,
            num_samples=self.num_samples,
            num_bytes=self._file.num_bytes,
            sha256=self._file.hexdigest(),
        )
        return info, index

    def abandon(self) -> None:
        """Remove the temporary file."""
        # Closed first, or tarfile writes to the closed file when it is collected.
        with contextlib.suppress(OSError):
            self._tar.close()
        self._file.abandon()


def write_shard(
    path: Path, split: str, samples: Iterable[tuple[str, dict[str, bytes]]]
) -> tuple[ShardInfo, ShardIndex]:
    """Write a whole shard from (key, members)."""
    writer = ShardWriter(path, split)
    try:
        for key, members in samples:
            writer.write(key, members)
        return writer.finish()
    except BaseException:
        writer.abandon()
        raise
