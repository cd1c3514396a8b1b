"""``dinogen pyramids``: the pyramids of a folder of faces, in part files that survive a kill."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from dinogen import dist
from dinogen.features import GuideInfo
from dinogen.features.base import guide_identity
from dinogen.features.resize import resized_with_antialias
from dinogen.files import write_bytes
from dinogen.prepare.crop import Crop
from dinogen.prepare.faces import faces_have_captions, read_faces
from dinogen.prepare.find import find_photos
from dinogen.prepare.pyramid import Levels, PyramidMaker, batched
from dinogen.prepare.read import PrepareError

_FORMAT = "dinogen-pyramids"
_VERSION = 1
_HEADER = "dinogen"

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
    a kill the same call redoes at most one part per rank.

    Args:
        faces: as :func:`dinogen.prepare.faces.read_faces` reads it.
        out: folder; made if missing.
        maker: guides and settings.
        progress: called with this rank's number of faces done and to do.

    Raises:
        PrepareError: ``faces`` cannot be read, or ``out`` lies below it or holds pyramids of
            other guides, other settings or other faces.
    """
    if out.resolve().is_relative_to(faces.resolve()):
        raise PrepareError(f"{out}: lies below the faces in {faces}: choose a folder outside it")
    size = maker.config.shard_size
    num_faces = len(find_photos(faces).photos)
    num_parts = -(-num_faces // size)
    with_text = maker.embedder is not None and faces_have_captions(faces)
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
    out.mkdir(parents=True, exist_ok=True)
    _check_parts(out, num_parts, header, num_faces)
    maker.warn_of_resize(out)
    with dist.main_section() as main:
        if main:
            for leftover in out.glob(".*.tmp"):
                leftover.unlink()
    rank, world_size = dist.rank(), dist.world_size()
    mine = range(rank, num_parts, world_size)
    shares = [range(number * size, min((number + 1) * size, num_faces)) for number in mine]
    total = sum(map(len, shares))
    num_done, num_seen = 0, 0
    crops_of_parts = batched(read_faces(faces, chain.from_iterable(shares)), size)
    for number, crops in zip(mine, crops_of_parts, strict=True):
        path = out / _part_name(number)
        hashed = _faces_hash(crops, with_text)
        written = {**header, "faces": hashed, "keys": [crop.key for crop in crops]}
        if _is_done(path, written):
            num_seen += len(crops)
        else:
            tensors: Levels = {}
            for crop, levels in maker.levels(crops, with_text):
                tensors |= {f"{crop.key}/{name}": array for name, array in levels.items()}
                num_seen += 1
                if progress is not None:
                    progress(num_seen, total)
            write_bytes(path, save(tensors, {_HEADER: json.dumps(written)}))
            num_done += 1
        if progress is not None:
            progress(num_seen, total)
    return PartsSummary(num_parts, num_done, len(mine) - num_done)


class PartFiles:
    """Pyramids that :func:`write_pyramids` wrote, by key.

    Attributes:
        folder: where they lie.
        guide: identity of the guide that made them.
        guides: of further ones, by name.
        clip: of the embedder.
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
        self._paths: dict[str, Path] = {}
        for path, header in zip(paths, headers, strict=True):
            if changed := _changes(headers[0], header):
                raise PrepareError(
                    f"{path}: differs from {paths[0].name} in {changed}: delete {folder} and run "
                    "`dinogen pyramids` again"
                )
            self._paths |= dict.fromkeys(header["keys"], path)
        self._open: tuple[Path, Any] | None = None

    def keys(self) -> set[str]:
        """Keys of all faces that have a pyramid."""
        return set(self._paths)

    def names(self, sources: Mapping[str, str]) -> dict[str, str]:
        """Under which key each face's pyramid lies: its own.

        Args:
            sources: by the face's key, the path of the picture that it comes from.
        """
        return {key: key for key in sources}

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


def _check_parts(out: Path, num_parts: int, header: dict[str, Any], num_faces: int) -> None:
    """Refuse a folder with parts of something else before any work is done."""
    wanted = {_part_name(number) for number in range(num_parts)}
    for path in sorted(out.glob("part-*.safetensors")):
        if path.name not in wanted:
            raise _foreign(path, f"{num_faces} faces have {num_parts} parts")
        try:
            found = _read_header(path)
        except PrepareError:
            continue  # made anew when its turn comes
        if changed := _changes(found, header):
            raise _foreign(path, changed)


def _resized_with_antialias(out: Path) -> bool:
    """How the images of the parts in a folder were enlarged; as today if there are none yet."""
    for path in sorted(out.glob("part-*.safetensors")):
        try:
            return resized_with_antialias({"pyramids": _read_header(path)["settings"]})
        except PrepareError:
            continue  # told, or made again, when its turn comes
    return True


def _is_done(path: Path, written: dict[str, Any]) -> bool:
    if not path.exists():
        return False
    try:
        found = _read_header(path)
    except PrepareError as error:
        _logger.warning("%s; it is made anew", error)
        return False
    if (found["faces"], found["keys"]) != (written["faces"], written["keys"]):
        raise _foreign(path, "the faces have changed")
    return True


def _foreign(path: Path, what: str) -> PrepareError:
    return PrepareError(
        f"{path}: belongs to other pyramids ({what}): choose another folder, or delete "
        f"{path.parent}"
    )


def _level_names(header: dict[str, Any]) -> list[str]:
    """Names of the levels that every face of a part has."""
    settings = header["settings"]
    pyramid = [f"{k[0]}{g}" for k in settings.get("kinds", ()) for g in settings.get("grids", ())]
    further = [f"{name}.{level}" for name in header.get("guides", {}) for level in pyramid]
    return pyramid + further + [name for name in ("clip", "text") if header.get(name)]


def _changes(old: dict[str, Any], new: dict[str, Any]) -> str:
    """What differs between the headers of two parts, in words; empty if nothing."""
    before, now = old["settings"], new["settings"]
    changed = [
        f"prepare.pyramids.{name}: {before.get(name)}, now {now.get(name)}"
        for name in {**before, **now}
        if before.get(name) != now.get(name)
    ]
    for name in {"": None} | old.get("guides", {}) | new.get("guides", {}):
        pair = [h.get("guides", {}).get(name, {}) if name else h["guide"] for h in (old, new)]
        if guide_identity(pair[0]) != guide_identity(pair[1]):
            key = f"guides.{name}" if name else "guide"
            changed.append(f"{key}: {_who(pair[0])}, now {_who(pair[1])}")
    clips = [network_of(header.get("clip", {})) for header in (old, new)]
    if clips[0] != clips[1]:
        paths = [header.get("clip", {}).get("path", "none") for header in (old, new)]
        changed.append(f"clip: {paths[0]}, now {paths[1]}")
    if old.get("text") != new.get("text"):
        changed.append("captions: there were none" if new.get("text") else "captions: none now")
    return "; ".join(changed)


def network_of(clip: Mapping[str, Any]) -> dict[str, Any]:
    """What two embedders share that give the same embeddings: all but where they came from."""
    return {name: value for name, value in clip.items() if name not in ("path", "revision")}


def _who(guide: dict[str, Any]) -> str:
    return f"{(info := GuideInfo(**guide)).label} layer {info.layer}" if guide else "none"


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
            f"{path}: has version {header['version']}, this dinogen reads {_VERSION}: delete "
            f"{path.parent} and run `dinogen pyramids` again"
        )
    return header


def _damaged(path: Path, error: Exception) -> PrepareError:
    return PrepareError(f"{path}: damaged ({error}): delete it and run `dinogen pyramids` again")
