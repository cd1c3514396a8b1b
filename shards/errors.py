"""The errors of this package: each names the file and the remedy; and how a name is shown."""

from __future__ import annotations

from pathlib import Path

# A name in a tar may be megabytes long; longer ones than this are shortened to both ends.
_LONGEST = 160
_HEAD, _TAIL = 100, 40


def show_name(name: str) -> str:
    """A name from a tar as part of one line of text, safe for any terminal and any log.

    Control and invisible characters, line breaks and bytes that are not UTF-8 are escaped. The
    middle of a name of more than 160 characters is left out, and its length is added.
    """
    if len(name) <= _LONGEST:
        return show_text(name)
    left_out = f"{show_text(name[:_HEAD])}...{show_text(name[-_TAIL:])}"
    return f"{left_out} ({len(name):,} characters)"


def show_text(text: str) -> str:
    """Text as one printable line: what is not printable is escaped as in Python."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class ShardsError(Exception):
    """Base of all errors about data on disk; the message names the file and the remedy."""


class ManifestError(ShardsError):
    """`manifest.json` or the file of statistics is missing, unreadable or contradicts itself."""


class IndexFileError(ShardsError):
    """A shard's index is unreadable or does not fit its tar."""


class FetchError(ShardsError):
    """A file behind a URL could not be fetched; temporary faults were retried.

    It says nothing about a sample, so `on_error="skip"` does not skip it.
    """


class PackError(ShardsError):
    """Samples cannot be packed as asked: duplicate key, wrong shape, folder in use."""


class FinishedError(PackError):
    """The folder to pack into holds a finished dataset.

    Attributes:
        manifest: path of its manifest.
    """

    def __init__(self, manifest: Path) -> None:
        self.manifest = manifest
        super().__init__(
            f"{manifest.parent} holds a finished dataset; delete it or choose another folder"
        )


class CorruptSample(ShardsError):
    """One sample cannot be read as it was written.

    Attributes:
        shard: file name of the tar.
        key: key of the sample, or `sample N` where even the key is lost.
        member: suffix of the damaged member (`jpg`, `p4.npy`), or "" for the whole sample.
        what: what is wrong.
    """

    def __init__(self, shard: str, key: str, member: str, what: str) -> None:
        self.shard, self.key, self.member, self.what = shard, key, member, what
        place = show_name(f"{key}.{member}" if member else key)
        super().__init__(
            f"{shard}: {place}: {what}; `dinogen shards verify` lists all damage, "
            f"`dinogen shards repair` rewrites the shard without the sample, data.on_error=skip "
            f"(in Python on_error='skip') skips it"
        )

    def __reduce__(self) -> tuple[type[CorruptSample], tuple[str, str, str, str]]:
        return CorruptSample, (self.shard, self.key, self.member, self.what)
