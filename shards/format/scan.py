"""Builds the index of a tar: samples found by their headers, payloads measured and summed."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from shards.errors import IndexFileError, show_name
from shards.files import gather, read_at, sum64, too_sparse
from shards.format.foreign import what_it_is
from shards.format.index import NO_LABEL, Column, Fault, Indirect, ShardIndex, as_keys
from shards.format.manifest import LevelInfo
from shards.format.sample import (
    IMAGE_SUFFIXES,
    LABEL_SUFFIX,
    LABEL_SUFFIXES,
    META_SUFFIX,
    VECTORS,
    as_array,
    decode_label,
    decode_meta,
    image_suffix,
    level_grid,
    level_of_suffix,
    npy_header,
    split_name,
    unusable,
)
from shards.format.tar import Member, TarError, walk
from shards.image.decode import image_header

# What levels are read as; all other numbers are converted to the second.
_FLOATS = ("<f2", "<f4")
_CHUNK = 1 << 26
_IMAGE_HEAD = 4096
_NPY_HEAD = 256
RESTORE = "restore the shard from a copy, or run `dinogen shards repair` to keep what can be read"
FIX_ACCESS = "check its permissions and the disk, or restore the file from a copy"
_SORT = "make the tar again with `tar --sort=name`"


@dataclass(frozen=True)
class TarProblem:
    """Why a whole tar cannot be used as it is: what is wrong, at which sample, and the remedy."""

    key: str
    what: str
    remedy: str

    def __str__(self) -> str:
        return f"{f'{show_name(self.key)}: ' if self.key else ''}{self.what}; {self.remedy}"


@dataclass
class _Entry:
    """One sample found in a tar: its members by suffix.

    Attributes:
        repeated: suffixes that occur more than once; the first of them counts.
        beside_damage: it is right before or after damage, so it may lack members.
        overrun: the content of its last member holds a header: bytes of it were lost.
    """

    key: str
    members: dict[str, Member] = field(default_factory=dict)
    repeated: list[str] = field(default_factory=list)
    beside_damage: bool = False
    overrun: bool = False


@dataclass
class Survey:
    """What a tar holds.

    Attributes:
        index: of its samples; None if it holds none.
        problems: why it cannot be used as it is.
        torn: headers are damaged, or members are lost: other tools fail on it, too.
        lost: keys of samples that are known and cannot be used at all.
        num_holes: places where a file is lost, whose sample may be unknown.
        without_image: names like `README (md)` of groups that are no sample.
        not_needed: names of the members that belong to no sample, including those without a key.
        links: entries that are no files, by kind.
        keys_twice: keys that several samples have.
    """

    index: ShardIndex | None = None
    problems: list[TarProblem] = field(default_factory=list)
    torn: bool = False
    lost: list[str] = field(default_factory=list)
    num_holes: int = 0
    without_image: list[str] = field(default_factory=list)
    not_needed: list[str] = field(default_factory=list)
    links: Counter[str] = field(default_factory=Counter)
    keys_twice: list[str] = field(default_factory=list)

    def notes(self, named: Set[tuple[str, str]] | None = None) -> list[str]:
        """What a user has to know about a tar that can be used, one line each.

        Args:
            named: (key, suffix) of the faults that are named elsewhere, including keys that occur
                twice; None if none are.
        """
        lines = []
        if self.links:
            lines.append(f"skipped, not regular files: {', '.join(self.link_counts())}")
        if self.without_image and self.index is not None:
            lines.append(f"skipped, no image or features: {listed(self.without_image)}")
        if named is None and self.keys_twice:
            keys = [show_name(key) for key in self.keys_twice]
            lines.append(f"keys that occur twice: {listed(keys)}")
        if self.index is not None:
            found = ((self.index.key(fault.row), fault) for fault in self.index.faults)
            shown = [
                f"{show_name(f'{key}.{fault.suffix}')}: {fault.what}"
                for key, fault in found
                if (key, fault.suffix) not in (named or ())
            ]
            if shown:
                lines.append(f"members that cannot be used: {listed(shown)}")
        if self.index is not None and self.index.indirect:
            count = len(self.index.indirect)
            lines.append(
                f"{count} {_plural('member', count)} converted on each read, which is slower"
            )
        return lines

    def link_counts(self) -> list[str]:
        """The entries that are not regular files, like `2 hard links`."""
        return [f"{count} {_plural(kind, count)}" for kind, count in self.links.items()]


def _plural(word: str, count: int) -> str:
    return word if count == 1 else f"{word}s"


def _shortened(names: list[str]) -> str:
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")


def listed(names: list[str]) -> str:
    """The first names of a list, and how many more there are."""
    shown = "; ".join(names[:3])
    return f"{shown}; and {len(names) - 3} more" if len(names) > 3 else shown


def scan(path: Path, with_sums: bool, levels: Mapping[str, LevelInfo] | None = None) -> ShardIndex:
    """Index of a sound tar, from its headers alone or (with_sums) from all its bytes.

    Args:
        path: of the tar.
        with_sums: read the payloads too, and compute their sums.
        levels: what the arrays must be; if None, what they are in most samples.

    Raises:
        IndexFileError: if the tar is damaged, holds no sample, or is no tar.
    """
    found = survey(path, with_sums, levels)
    if found.problems or found.index is None:
        raise IndexFileError(f"{path}: {found.problems[0]}")
    return found.index


def survey(
    path: Path,
    with_sums: bool,
    levels: Mapping[str, LevelInfo] | None = None,
    pixels: bool = False,
    finite: bool = False,
) -> Survey:
    """Scan a tar, or a file that may be none.

    Args:
        path: of the tar.
        with_sums: read the payloads too, and compute their sums.
        levels: what the arrays must be; if None, what they are in most samples.
        pixels: read the sizes of the images from their headers.
        finite: check every number of the levels; needs `with_sums`.

    Raises:
        OSError: if the file cannot be read.
    """
    found = Survey()
    descriptor = os.open(path, os.O_RDONLY)
    try:
        entries = _entries(descriptor, path, found)
        if entries:
            table = _Table(descriptor, entries, levels or {}, with_sums, finite)
            found.index = table.index()
            if pixels:
                sizes = image_sizes(descriptor, found.index)
                found.index = replace(found.index, pixels=sizes)
    finally:
        os.close(descriptor)
    return found


def _entries(descriptor: int, path: Path, found: Survey) -> list[_Entry]:
    """The samples of a tar; what is wrong with the tar goes into `found`."""
    damage: list[TarError] = []
    groups = list(_groups(descriptor, damage, found))
    if not groups and damage and damage[0].offset == 0 and (known := what_it_is(path)):
        found.problems.append(TarProblem("", *known))
        return []
    for error, key in zip(damage, _beside(groups, damage), strict=True):
        found.torn = True
        found.num_holes += error.loses
        end = error.end
        lost = f"; the next readable header is at byte {end}" if end is not None else ""
        where = f"at this sample or right after it: {error}{lost}"
        found.problems.append(TarProblem(key or "the first sample", where, RESTORE))
    apart = _note_apart(groups, found)
    samples = [group for group in groups if _is_sample(group)]
    usual = _usual(samples)
    kept = []
    for group in groups:
        if not _is_sample(group):
            kinds = _shortened([show_name(suffix) for suffix in group.members])
            found.without_image.append(f"{show_name(group.key)} ({kinds})")
            if group.beside_damage:
                _lose(group, "lost its image", found)
            else:
                found.not_needed += [show_name(f"{group.key}.{name}") for name in group.members]
        elif found.torn and group.key in apart:
            _lose(group, "its members are not next to each other", found)
        elif group.overrun:
            _lose(group, "lost bytes: another header is inside it", found)
        elif group.beside_damage and not usual <= group.members.keys():
            missing = ", ".join(map(show_name, sorted(usual - group.members.keys())))
            _lose(group, f"lacks {missing}, which other samples have", found)
        else:
            kept.append(group)
    if not kept and not found.problems:
        found.problems.append(_no_sample(groups))
    return kept


def _lose(group: _Entry, what: str, found: Survey) -> None:
    found.lost.append(group.key)
    found.problems.append(TarProblem(group.key, what, RESTORE))


def _groups(descriptor: int, damage: list[TarError], found: Survey) -> Iterator[_Entry]:
    """Samples of a tar, as WebDataset groups them: neighbours with the same key."""
    entry: _Entry | None = None
    num_damaged = 0
    for member in walk(descriptor, damage.append, found.links):
        split = split_name(member.name)
        torn = len(damage) > num_damaged
        if torn and entry is not None:
            entry.beside_damage = True
            entry.overrun |= any(_overruns(error) for error in damage[num_damaged:])
        if split is None:
            found.not_needed.append(show_name(member.name))
            continue
        num_damaged = len(damage)
        key, suffix = split
        if entry is None or entry.key != key:
            if entry is not None:
                yield entry
            entry = _Entry(key, beside_damage=torn)
        if suffix in entry.members:
            entry.repeated.append(suffix)
        else:
            entry.members[suffix] = _lighter(member, suffix)
    if entry is not None:
        entry.beside_damage |= len(damage) > num_damaged
        entry.overrun |= any(_overruns(error) for error in damage[num_damaged:])
        yield entry


def _lighter(member: Member, suffix: str) -> Member:
    """A member without the first bytes if they are not needed: a tar may have a million members."""
    if level_of_suffix(suffix) is not None:
        return replace(member, head=member.head[:_NPY_HEAD])
    whole = suffix in LABEL_SUFFIXES and len(member.head) == member.size
    return member if whole else replace(member, head=b"")


def _overruns(error: TarError) -> bool:
    return error.end is not None and error.end < error.offset


def _beside(groups: list[_Entry], damage: list[TarError]) -> list[str]:
    """For each damaged place, the key of the last sample that begins before it."""
    begins = [
        (min(member.offset for member in group.members.values()), group.key) for group in groups
    ]
    return [
        next((key for offset, key in reversed(begins) if offset <= error.offset), "")
        for error in damage
    ]


def _note_apart(groups: list[_Entry], found: Survey) -> set[str]:
    """Find keys that occur again after other samples, with further members."""
    first: dict[str, _Entry] = {}
    apart = []
    for group in groups:
        before = first.setdefault(group.key, group)
        if before is group:
            continue
        if _is_sample(before) and _is_sample(group):
            found.keys_twice.append(group.key)
        elif (_is_sample(before) or _is_sample(group)) and not (
            before.members.keys() & group.members.keys()
        ):
            apart.append(group.key)
    # In a damaged tar such names may be the result of the damage.
    if apart and not found.torn:
        others = f", nor are those of {len(apart) - 1} more samples" if len(apart) > 1 else ""
        what = f"members of sample {show_name(apart[0])} are not next to each other{others}"
        found.problems.append(TarProblem(apart[0], what, _SORT))
    return set(apart)


def _is_sample(group: _Entry) -> bool:
    suffixes = list(group.members)
    return image_suffix(suffixes) is not None or any(map(level_of_suffix, suffixes))


def _usual(groups: list[_Entry]) -> frozenset[str]:
    """The members that most samples away from damage have."""
    counts = Counter(frozenset(g.members) for g in groups if not g.beside_damage)
    return counts.most_common(1)[0][0] if counts else frozenset()


def _no_sample(groups: list[_Entry]) -> TarProblem:
    for group in groups:
        for suffix in group.members:
            stem, dot, last = suffix.rpartition(".")
            if dot and last in IMAGE_SUFFIXES:
                name, key = show_name(f"{group.key}.{suffix}"), show_name(group.key)
                what = (
                    f"no sample has an image: a name is split at its first dot, so {name} is read "
                    f"as '{show_name(suffix)}' of sample '{key}'"
                )
                base = group.key.rpartition("/")[2]
                better = show_name(f"{base}_{stem.replace('.', '_')}.{last}")
                return TarProblem("", what, f"rename it to {better}, and make the tar again")
    kinds = ", ".join(IMAGE_SUFFIXES)
    if not groups:
        return TarProblem("", "holds no sample", f"make it from files NAME.SUFFIX ({kinds})")
    suffixes = sorted({suffix or "none" for group in groups for suffix in group.members})
    shown = _shortened([show_name(suffix) for suffix in suffixes])
    what = f"no sample has an image ({kinds}); the suffixes of its members are: {shown}"
    return TarProblem("", what, "give the images one of these suffixes, and make the tar again")


@dataclass(frozen=True)
class _Form:
    """How the array of a level is stored."""

    header: int
    dtype: np.dtype[np.generic]
    shape: tuple[int, ...]
    fortran: bool

    @property
    def column(self) -> tuple[str, tuple[int, ...]]:
        """dtype and shape that it is read as."""
        wide = self.dtype.str not in ("<f2", ">f2")
        return _FLOATS[wide], self.shape


class _Table:
    """The samples of a tar as the arrays of an index."""

    def __init__(
        self,
        descriptor: int,
        entries: list[_Entry],
        levels: Mapping[str, LevelInfo],
        with_sums: bool,
        finite: bool,
    ) -> None:
        self._descriptor = descriptor
        self._entries = entries
        self._with_sums, self._finite = with_sums, finite
        self._faults: list[Fault] = []
        self._indirect: list[Indirect] = []
        self._forms: dict[tuple[int, str], _Form] = {}
        self._columns = self._find_columns(levels)

    def index(self) -> ShardIndex:
        """The index of the tar."""
        bad = {(fault.row, fault.suffix) for fault in self._faults}
        rows = [self._row(number, entry, bad) for number, entry in enumerate(self._entries)]
        labels = [self._label(number, entry) for number, entry in enumerate(self._entries)]
        table = [[row.get(suffix, (-1, 0, 0)) for suffix in self._columns] for row in rows]
        # Sums use all 64 bits; the signed type of the other two columns has only 63.
        sums = np.array([[cell[2] for cell in cells] for cells in table], np.uint64)
        labelled = None not in labels and any(label != NO_LABEL for label in labels)
        return ShardIndex(
            num_bytes=os.fstat(self._descriptor).st_size,
            columns=tuple(self._columns.values()),
            keys=as_keys([e.key.encode("utf-8", "surrogateescape") for e in self._entries]),
            offsets=np.array([[cell[0] for cell in cells] for cells in table], np.int64),
            sizes=np.array([[cell[1] for cell in cells] for cells in table], np.int64),
            sums=sums if self._with_sums else None,
            labels=np.array(labels, np.int64) if labelled else None,
            indirect=tuple(self._indirect),
            faults=tuple(self._faults),
        )

    def _find_columns(self, levels: Mapping[str, LevelInfo]) -> dict[str, Column]:
        """What each kind of member is: what most samples have, because one may be damaged."""
        columns: dict[str, Column] = {}
        kinds: dict[str, Counter[tuple[str, tuple[int, ...]]]] = {}
        for number, entry in enumerate(self._entries):
            for suffix, member in entry.members.items():
                columns.setdefault(suffix, Column(suffix))
                level = level_of_suffix(suffix)
                if level is None:
                    continue
                form = self._form(number, suffix, member, level)
                if form is not None:
                    self._forms[number, suffix] = form
                    kinds.setdefault(suffix, Counter())[form.column] += 1
        for suffix, counts in kinds.items():
            info = levels.get(level_of_suffix(suffix) or "")
            dtype, shape = counts.most_common(1)[0][0]
            if info is not None:
                dtype, shape = np.dtype(info.dtype).str, (info.grid**2, info.channels)
            columns[suffix] = Column(suffix, dtype, shape)
        return columns

    def _form(self, number: int, suffix: str, member: Member, level: str) -> _Form | None:
        """How a level is stored; None, with a fault, if it is none."""
        try:
            try:
                shape, dtype, fortran, header = npy_header(member.head, member.name)
            except ValueError:
                if len(member.head) == member.size:
                    raise
                # The header may be longer than what was kept of it, or be behind a hole.
                content = self._content(member)
                shape, dtype, fortran, header = npy_header(content, member.name)
            if level in VECTORS and len(shape) == 1:
                shape = (1, *shape)
            places = level_grid(level) ** 2
            if len(shape) != 2 or shape[0] != places or shape[1] < 1:
                if level in VECTORS:
                    return None  # other programs may give anything this name
                raise ValueError(f"has shape {shape}, expected ({places}, C)")
            if header + math.prod(shape) * dtype.itemsize != member.size:
                raise ValueError(f"{member.size} bytes do not fit {shape} {dtype}")
        except ValueError as error:
            if level not in VECTORS:
                what = str(error).removeprefix(f"{show_name(member.name)}: ")
                self._faults.append(Fault(number, suffix, what))
            return None
        # An array of one row or one column is stored the same way in either order.
        return _Form(header, dtype, shape, fortran and min(shape) > 1)

    def _row(
        self, number: int, entry: _Entry, bad: set[tuple[int, str]]
    ) -> dict[str, tuple[int, int, int]]:
        """(offset, size, sum) of every payload of a sample that can be used."""
        row = {}
        for suffix, member in entry.members.items():
            column, form = self._columns[suffix], self._forms.get((number, suffix))
            if suffix in entry.repeated:
                self._faults.append(Fault(number, suffix, "the sample has this member twice"))
            elif (number, suffix) in bad:
                continue
            elif (what := _too_sparse(member)) is not None:
                self._faults.append(Fault(number, suffix, what))
            elif column.shape is not None and (form is None or form.shape != column.shape):
                stored = "is no such array" if form is None else f"is {form.dtype} {form.shape}"
                what = f"{stored}, expected {column.dtype} {column.shape}"
                self._faults.append(Fault(number, suffix, what))
            else:
                cell = self._cell(number, suffix, member, form)
                if cell is not None:
                    row[suffix] = cell
        return row

    def _cell(
        self, number: int, suffix: str, member: Member, form: _Form | None
    ) -> tuple[int, int, int] | None:
        column = self._columns[suffix]
        header = 0 if column.shape is None or form is None else form.header
        offset, size = member.offset + header, member.size - header
        direct = member.extents is None and (
            column.shape is None
            or (form is not None and form.dtype.str == column.dtype and not form.fortran)
        )
        if not direct:
            if header and member.extents is not None:
                # The parts are cut where the header ends.
                extents = tuple(
                    (at + max(0, header - to), length - max(0, header - to), max(to - header, 0))
                    for at, length, to in member.extents
                    if to + length > header
                )
            else:
                extents = member.extents or ((offset, size, 0),)
            stored = Indirect(extents)
            if form is not None and column.shape is not None:
                stored = Indirect(extents, form.dtype.str, form.shape, form.fortran)
            offset = -2 - len(self._indirect)
        total = 0
        if self._with_sums:
            if direct and column.shape is None:
                total = _sum_of(self._descriptor, size, offset)
            else:
                content = self._content(member)[header:]
                total = sum64(content)
                if self._finite and form is not None and column.dtype is not None:
                    values = as_array(content, form.dtype, form.shape, form.fortran)
                    what = unusable(values, column.dtype)
                    if what is not None:
                        self._faults.append(Fault(number, suffix, what))
                        return None
        if not direct:
            self._indirect.append(stored)
        return offset, size, total

    def _label(self, number: int, entry: _Entry) -> int | None:
        """The label; None if there is none, `NO_LABEL` with a fault if it cannot be known."""
        faulty = False
        for suffix, decoded in ((META_SUFFIX, _label_of_meta), (LABEL_SUFFIX, decode_label)):
            if suffix not in entry.members or suffix in entry.repeated:
                continue
            if _too_sparse(entry.members[suffix]) is not None:
                faulty = True
                continue
            try:
                label = decoded(self._content(entry.members[suffix]), entry.key)
            except ValueError as error:
                what = str(error).removeprefix(f"{show_name(f'{entry.key}.{suffix}')}: ")
                self._faults.append(Fault(number, suffix, what))
                faulty = True
                continue
            if label is not None:
                return label
        return NO_LABEL if faulty else None

    def _content(self, member: Member) -> bytes:
        if len(member.head) == member.size:
            return member.head
        extents = member.extents
        if extents is None:
            return read_at(self._descriptor, member.size, member.offset)
        if (what := _too_sparse(member)) is not None:
            raise ValueError(what)
        return gather(self._descriptor, extents, member.size)


def _too_sparse(member: Member) -> str | None:
    return None if member.extents is None else too_sparse(member.size, member.extents)


def _label_of_meta(data: bytes, key: str) -> int | None:
    label: int | None = decode_meta(data, key).get("label")
    return label


def _sum_of(descriptor: int, size: int, offset: int) -> int:
    """sum64 of a range, a chunk of whole words at a time."""
    total = 0
    for start in range(0, size, _CHUNK):
        total += sum64(read_at(descriptor, min(_CHUNK, size - start), offset + start))
    return total & 0xFFFF_FFFF_FFFF_FFFF


def image_sizes(descriptor: int, index: ShardIndex) -> npt.NDArray[np.int32]:
    """(n, 2) width and height of the images by their headers, 0 where one cannot be read."""
    found = np.zeros((len(index), 2), np.int32)
    for suffix in reversed(IMAGE_SUFFIXES):
        number = index.column(suffix)
        if number is None:
            continue
        for row in np.flatnonzero(index.offsets[:, number] != -1).tolist():
            offset, size = int(index.offsets[row, number]), int(index.sizes[row, number])
            name = f"{index.key(row)}.{suffix}"
            found[row] = 0
            # The first bytes are usually enough; a preview or a profile may precede the size.
            for length in (min(size, _IMAGE_HEAD), size):
                if offset < -1:
                    data = gather(descriptor, index.indirect[-2 - offset].extents, size)
                else:
                    data = read_at(descriptor, length, offset)
                try:
                    found[row] = image_header(data, name)
                    break
                except ValueError:
                    continue
    return found
