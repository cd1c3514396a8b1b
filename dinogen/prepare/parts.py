"""``dinogen pyramids``: writes the pyramids of a folder of faces in resumable part files."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from dinogen.distributed import process_group
from dinogen.features import GuideInfo
from dinogen.features.base import guide_identity
from dinogen.features.pyramid import resized_with_antialias
from dinogen.files import write_bytes
from dinogen.prepare.faces.crop import Crop, Rejection
from dinogen.prepare.faces.folder import FaceFolder
from dinogen.prepare.faces.settings import exclusive_in
from dinogen.prepare.photos.changed import looks_like_an_accident
from dinogen.prepare.photos.find import counted
from dinogen.prepare.photos.read import BAD_CAPTION, PrepareError
from dinogen.prepare.pyramid import Levels, PyramidMaker
from shards.format.sample import (
    LATENTS,
    OF_LATENTS,
    flipped_guide,
    is_flipped_guide,
    level_guide,
)

_FORMAT = "dinogen-pyramids"
_VERSION = 1
_HEADER = "dinogen"
_NUM_CHECKED = 16

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PartsSummary:
    """What one rank did.

    Attributes:
        num_parts: part files of the whole folder.
        num_done: parts that this rank computed.
        num_kept: parts of this rank's share that an earlier run had finished.
    """

    num_parts: int
    num_done: int
    num_kept: int


def write_pyramids(
    faces: Path,
    out: Path,
    maker: PyramidMaker,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> PartsSummary:
    """Write ``out/part-00000.safetensors``, ...: the levels of the faces, in order of their keys.

    Parts hold ``prepare.pyramids.shard_size`` faces each. Under torchrun rank r makes the parts
    r, r + world_size, ...; finished parts of the same guide, settings and faces are kept, so after
    a kill the same call redoes at most one part per rank. If faces were removed, replaced or added
    since, parts are rewritten, but only new and replaced faces go through the guides.

    Args:
        faces: as :class:`dinogen.prepare.faces.folder.FaceFolder` reads it. Images of a plain
            folder that cannot be used are left out.
        out: folder; created if missing.
        maker: guides and settings.
        progress: called with this rank's number of faces done, and in total.

    Raises:
        PrepareError: ``faces`` cannot be read, or ``out`` is below it or holds pyramids of
            other guides, other settings or other faces.
    """
    if out.resolve().is_relative_to(faces.resolve()):
        raise PrepareError(f"{out}: is below the faces in {faces}: choose a folder outside it")
    folder = FaceFolder(faces)
    _warn_of_left_out(faces, folder.drop_odd())
    size = maker.config.shard_size
    num_parts = -(-len(folder) // size)
    with_text = maker.embedder is not None and folder.has_captions
    if maker.embedder is not None and folder.written and not with_text:
        _logger.warning(
            "%s: holds no captions, so there will be no text embeddings. If the photos have "
            "captions, run `dinogen faces` with this config (-c), then this command again",
            faces,
        )
    identity = maker.identity()
    maker.antialias = _resized_with_antialias(out)
    header = {
        "format": _FORMAT,
        "version": _VERSION,
        "guide": identity.pop("guide"),
        "settings": {**maker.settings(), "shard_size": size},
        **{name: networks for name, networks in identity.items() if networks},
        **({"text": True} if with_text else {}),
    }
    # One of the processes that share the work holds the lock for all.
    with exclusive_in(out, "pyramids") if process_group.is_main() else nullcontext():
        return _write(folder, out, maker, header, num_parts, with_text, progress)


def _write(
    folder: FaceFolder,
    out: Path,
    maker: PyramidMaker,
    header: dict[str, Any],
    num_parts: int,
    with_text: bool,
    progress: Callable[[int, int], None] | None,
) -> PartsSummary:
    """What :func:`write_pyramids` does once it has ``out`` to itself."""
    size = maker.config.shard_size
    out.mkdir(parents=True, exist_ok=True)
    known = _known(out, header, folder, with_text)
    maker.warn_of_resize(out)
    with process_group.rank_zero_section() as main:
        if main:
            for leftover in out.glob(".*.tmp"):
                leftover.unlink()
    rank, world_size = process_group.rank(), process_group.world_size()
    mine = range(rank, num_parts, world_size)
    shares = [range(n * size, min((n + 1) * size, len(folder))) for n in mine]
    total = sum(map(len, shares))
    num_done, num_seen, num_reused = 0, 0, 0
    for number, share in zip(mine, shares, strict=True):
        path = out / _part_name(number)
        crops = list(_crops(folder, share, with_text))
        sums = {crop.key: _sum(crop, with_text) for crop in crops}
        hashed = _faces_hash(crops, with_text)
        written = {**header, "faces": hashed, "keys": list(sums), "sums": list(sums.values())}
        if not _is_done(path, written):
            tensors: dict[str, Levels] = {}
            for crop in crops:
                if (found := known.levels(crop.key, sums[crop.key])) is not None:
                    tensors[crop.key] = found
            num_reused += len(tensors)
            fresh = [crop for crop in crops if crop.key not in tensors]
            for num_made, (crop, levels) in enumerate(maker.levels(fresh, with_text), start=1):
                tensors[crop.key] = levels
                if progress is not None:
                    progress(num_seen + num_made, total)
            if latents := _latents_in(tensors.values()):
                written["latents"] = latents
            flat = {f"{key}/{name}": array for key in sums for name, array in tensors[key].items()}
            write_bytes(path, save(flat, {_HEADER: json.dumps(written)}))
            num_done += 1
        num_seen += len(share)
        if progress is not None:
            progress(num_seen, total)
    with process_group.rank_zero_section() as main:
        if main:
            names = {_part_name(number) for number in range(num_parts)}
            for path in out.glob("part-*.safetensors"):
                if path.name not in names:
                    path.unlink()  # there were more faces before
    if num_reused:
        _logger.info("%s: %s of earlier parts reused", out, counted(num_reused, "pyramid"))
    return PartsSummary(num_parts, num_done, len(mine) - num_done)


def _latents_in(found: Iterable[Levels]) -> list[str]:
    """The levels of an autoencoder: their names depend on the size of the faces."""
    levels: Levels = next(iter(found), {})
    return [name for name in levels if level_guide(name) in OF_LATENTS]


class _Known:
    """Levels in existing parts, by key and sum; the parts stay open.

    Args:
        headers: of the parts that may be used, by path.
    """

    def __init__(self, headers: Mapping[Path, dict[str, Any]]) -> None:
        self._found: dict[str, tuple[str, Any, list[str]]] = {}
        for path, header in headers.items():
            if sums := header.get("sums"):
                file, names = safe_open(path, "numpy"), _level_names(header)
                for key, found in zip(header["keys"], sums, strict=False):
                    self._found[key] = (found, file, names)

    def levels(self, key: str, wanted: str) -> Levels | None:
        """The levels of a face, or None if they are not known."""
        if key not in self._found or self._found[key][0] != wanted:
            return None
        _, file, names = self._found[key]
        try:
            return {name: file.get_tensor(f"{key}/{name}") for name in names}
        except SafetensorError:
            return None  # computed again


class PartFiles:
    """Pyramids that :func:`write_pyramids` wrote, by key.

    Attributes:
        folder: where they are.
        guide: identity of the guide that made them.
        guides: identities of further guides, by name.
        clip: identity of the embedder.
        settings: their grids and kinds.

    Raises:
        PrepareError: there are none, or one is damaged or does not belong to the others.
    """

    def __init__(self, folder: Path) -> None:
        paths = sorted(folder.glob("part-*.safetensors"))
        if not paths:
            raise PrepareError(f"{folder}: holds no part-*.safetensors: run `dinogen pyramids`")
        self.folder = folder
        headers = [_read_header(path) for path in paths]
        self.guide: dict[str, Any] | None = headers[0]["guide"]
        self.guides: dict[str, dict[str, Any]] = headers[0].get("guides", {})
        self.clip: dict[str, Any] = headers[0].get("clip", {})
        self.settings: dict[str, Any] = headers[0]["settings"]
        self._names = _level_names(headers[0])
        self._with_text = bool(headers[0].get("text"))
        self._paths: dict[str, Path] = {}
        self._sums: dict[str, str] = {}
        for path, header in zip(paths, headers, strict=True):
            if changed := _changes(headers[0], header):
                raise PrepareError(
                    f"{path}: differs from {paths[0].name} in {changed}: delete {folder} and run "
                    "`dinogen pyramids` again"
                )
            self._paths |= dict.fromkeys(header["keys"], path)
            self._sums |= dict(zip(header["keys"], header.get("sums", ()), strict=False))
        self._open: tuple[Path, Any] | None = None

    def keys(self) -> set[str]:
        """Keys of all faces that have a pyramid."""
        return set(self._paths)

    def names(self, sources: Mapping[str, str]) -> dict[str, str]:
        """The key of each face's pyramid: its own.

        Args:
            sources: by the face's key, the path of the image that it comes from.
        """
        return {key: key for key in sources}

    def belongs(self, crop: Crop) -> bool:
        """Whether the pyramid of this key was made from this face, as far as the parts say."""
        found = self._sums.get(crop.key)
        return found is None or found == _sum(crop, self._with_text)

    def levels(self, key: str) -> Levels:
        """The levels of one face; fastest in order of the keys.

        Raises:
            PrepareError: the part is damaged.
        """
        path = self._paths[key]
        try:
            if self._open is None or self._open[0] != path:
                self._open = (path, safe_open(path, "numpy"))
            return {name: self._open[1].get_tensor(f"{key}/{name}") for name in self._names}
        except SafetensorError as error:
            raise _damaged(path, error) from error


def _part_name(number: int) -> str:
    return f"part-{number:05d}.safetensors"


def _warn_of_left_out(faces: Path, rejections: Sequence[Rejection]) -> None:
    for line in rejections:
        _logger.warning("%s: left out: %s: %s", faces / line.source, line.reason, line.detail)


def _crops(folder: FaceFolder, share: range, with_text: bool) -> Iterator[Crop]:
    """The faces of a part; those that cannot be used are logged and left out."""
    for item in folder.read(share, with_captions=with_text):
        if isinstance(item, Crop):
            yield item
        elif item.reason == BAD_CAPTION:
            _logger.warning("%s: used without its caption: %s", item.source, item.detail)
        else:
            _warn_of_left_out(folder.folder, [item])


def _resized_with_antialias(out: Path) -> bool:
    """How the images of the parts in a folder were enlarged; the current way if there are none."""
    for path in sorted(out.glob("part-*.safetensors")):
        try:
            return resized_with_antialias({"pyramids": _read_header(path)["settings"]})
        except PrepareError:
            continue  # reported, or written again, when its turn comes
    return True


def _known(out: Path, header: dict[str, Any], folder: FaceFolder, with_text: bool) -> _Known:
    """What the parts in ``out`` already hold.

    Raises:
        PrepareError: a part belongs to something else, or most of its faces are missing.
    """
    headers = {}
    for path in sorted(out.glob("part-*.safetensors")):
        try:
            found = _read_header(path)
        except PrepareError:
            continue  # written again when its turn comes
        if changed := _changes(found, header):
            raise _foreign(path, changed)
        headers[path] = found
    numbers = {key: number for number, (key, _) in enumerate(folder.metas())} if headers else {}
    before = [(path, key) for path, found in headers.items() for key in found["keys"]]
    lost = [(path, key) for path, key in before if key not in numbers]
    if looks_like_an_accident(len(lost), len(before)):
        raise _foreign(
            lost[0][0], f"{len(lost)} of {counted(len(before), 'face', 'is', 'are')} not in FACES"
        )
    _check_some(headers, numbers, folder, with_text)
    return _Known(headers)


def _check_some(
    headers: Mapping[Path, dict[str, Any]],
    numbers: Mapping[str, int],
    folder: FaceFolder,
    with_text: bool,
) -> None:
    """Raise PrepareError if none of the faces is the one that the parts were made from."""
    sums = {
        key: (path, found)
        for path, header in headers.items()
        for key, found in zip(header["keys"], header.get("sums", ()), strict=False)
        if key in numbers
    }
    checked = list(sums)[:: max(1, len(sums) // _NUM_CHECKED)]
    for key in checked:
        for crop in _crops(folder, range(numbers[key], numbers[key] + 1), with_text):
            if _sum(crop, with_text) == sums[key][1]:
                return
    if checked:
        raise _foreign(sums[checked[0]][0], "the faces have changed")


def _is_done(path: Path, written: dict[str, Any]) -> bool:
    if not path.exists():
        return False
    try:
        found = _read_header(path)
    except PrepareError as error:
        _logger.warning("%s; it is written again", error)
        return False
    if (found["faces"], found["keys"]) == (written["faces"], written["keys"]):
        return True
    if "sums" not in found:  # written by an earlier version
        raise _foreign(path, "the faces have changed")
    return False


def _foreign(path: Path, what: str) -> PrepareError:
    return PrepareError(
        f"{path}: belongs to other pyramids ({what}): choose another folder, or delete "
        f"{path.parent}"
    )


def _level_names(header: dict[str, Any]) -> list[str]:
    """Names of the levels that every face of a part has."""
    settings = header["settings"]
    pyramid = [f"{k[0]}{g}" for k in settings.get("kinds", ()) for g in settings.get("grids", ())]
    guides = [name for name in header.get("guides", {}) if name not in OF_LATENTS]
    further = [f"{name}.{level}" for name in guides for level in pyramid]
    further += header.get("latents", [])
    return pyramid + further + [name for name in ("clip", "text") if header.get(name)]


def _changes(old: dict[str, Any], new: dict[str, Any]) -> str:
    """What differs between the headers of two parts, in words; empty if nothing."""
    before, now = old["settings"], new["settings"]
    changed = [
        change_of(f"prepare.pyramids.{name}", before.get(name), now.get(name))
        for name in {**before, **now}
        if before.get(name) != now.get(name)
    ]
    known, wanted = ({"": header["guide"]} | header.get("guides", {}) for header in (old, new))
    changed += changes_of_guides(known, wanted, _label)
    clips = [network_of(header.get("clip", {})) for header in (old, new)]
    if clips[0] != clips[1]:
        paths = [header.get("clip", {}).get("path", "none") for header in (old, new)]
        changed.append(f"clip: {paths[0]}, now {paths[1]}")
    if old.get("text") != new.get("text"):
        changed.append(
            "captions: none before" if new.get("text") else "captions: none now, but before"
        )
    return "; ".join(changed)


def change_of(key: str, old: Any, new: Any) -> str:
    """A setting that differs, in words."""
    if key.endswith(".flips"):  # only true is written down
        old, new = ("true" if value else "false" for value in (old, new))
    return f"{key}: {old}, now {new}"


def changes_of_guides(
    old: Mapping[str, dict[str, Any]],
    new: Mapping[str, dict[str, Any]],
    label: Callable[[dict[str, Any]], str],
) -> list[str]:
    """What differs between guides, in words, each by the key of a config that names it.

    Features of mirrored images come from the same guides: whether there are any is
    ``prepare.pyramids.flips``, and ``prepare.latents.flips`` for an autoencoder's latents.

    Args:
        old: identities by the names in a manifest; "" is the main guide.
        new: the same.
        label: describes one; an empty one is none.
    """
    changed = []
    for name in dict.fromkeys([*old, *new]):
        before, now = old.get(name, {}), new.get(name, {})
        if name == flipped_guide(LATENTS):
            if bool(before) != bool(now) and old.get(LATENTS) and new.get(LATENTS):
                changed.append(change_of("prepare.latents.flips", before, now))
        elif is_flipped_guide(name):
            continue
        elif guide_identity(before) != guide_identity(now):
            key = "prepare.latents.path" if name == LATENTS else f"guides.{name}"
            changed.append(f"{key if name else 'guide'}: {label(before)}, now {label(now)}")
    return changed


def network_of(clip: Mapping[str, Any]) -> dict[str, Any]:
    """What is equal for embedders that give the same embeddings: all but where they came from."""
    return {name: value for name, value in clip.items() if name not in ("path", "revision")}


def _label(guide: dict[str, Any]) -> str:
    return f"{(info := GuideInfo.of(guide)).label} layer {info.layer}" if guide else "none"


def _sum(crop: Crop, with_text: bool) -> str:
    """Identifies the content of a face, and of its caption if that counts."""
    return _faces_hash([crop], with_text)[:32]


def _faces_hash(crops: list[Crop], with_text: bool) -> str:
    digest = hashlib.sha256()
    for crop in crops:
        digest.update(hashlib.sha256(crop.image).digest())
        if with_text:
            digest.update(hashlib.sha256((crop.caption or "").encode()).digest())
    return digest.hexdigest()


def _read_header(path: Path) -> dict[str, Any]:
    try:
        with safe_open(path, "numpy") as file:
            header = json.loads((file.metadata() or {}).get(_HEADER, "{}"))
    except (SafetensorError, OSError, ValueError) as error:
        raise _damaged(path, error) from error
    if not isinstance(header, dict) or header.get("format") != _FORMAT:
        raise PrepareError(f"{path}: was not written by `dinogen pyramids`: delete it")
    if header["version"] != _VERSION:
        raise PrepareError(
            f"{path}: has version {header['version']}, but this dinogen reads {_VERSION}: delete "
            f"{path.parent} and run `dinogen pyramids` again"
        )
    return header


def _damaged(path: Path, error: Exception) -> PrepareError:
    return PrepareError(f"{path}: damaged ({error}): delete it and run `dinogen pyramids` again")
