"""Turns photos into a stream of crops and rejections, in the order of the photos."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from dinogen.config import FacesConfig
from dinogen.prepare.faces.crop import (
    Candidate,
    Crop,
    Duplicates,
    Rejection,
    Result,
    cut,
    read,
    read_and_cut,
)
from dinogen.prepare.photos.find import Photo, Photos, face_key
from dinogen.prepare.photos.read import BAD_CAPTION, Unusable, probe_photo, try_caption

if TYPE_CHECKING:
    import torch

    from dinogen.prepare.faces.detect import FaceDetector

Progress = Callable[[int, int], None]

# Photos are decoded one group in advance; a group has at most this many photos and pixels, or is
# a single photo.
_GROUP_PHOTOS = 64
_GROUP_PIXELS = 50_000_000


def iter_faces(
    photos: Photos,
    config: FacesConfig,
    *,
    device: str | torch.device = "auto",
    skip: Callable[[str], bool] | None = None,
    progress: Progress | None = None,
    duplicates: Duplicates | None = None,
    with_captions: bool = True,
    landmark_offset: float = 0.0,
) -> Iterator[Crop | Rejection]:
    """Find, align and check the faces of photos.

    The order is that of the photos' paths. Memory is bounded by a few dozen photos. The result
    does not depend on ``num_threads``; on CPU it does not depend on ``batch`` or ``skip`` either,
    on a GPU these may change the networks' rounding. On CPU each thread works on its own photo,
    because threads inside these small networks mostly wait for each other.

    Args:
        photos: as :func:`dinogen.prepare.photos.find.find_photos` lists them.
        config: what is accepted, and how it is cut out.
        device: where faces are detected; ``auto`` is the GPU of this rank if there is one.
        skip: called with a photo's key; photos for which it is true are skipped.
        progress: called with the number of photos done (or skipped) and of all photos.
        duplicates: what to compare with, besides the crops of this call: fill it with the crops of
            the photos that are skipped. Unused if ``max_duplicate_distance`` is -1.
        with_captions: whether captions beside photos are read; if one cannot be used there is a
            rejection, and the photo is used without it.
        landmark_offset: as in :class:`dinogen.prepare.faces.detect.FaceDetector`.

    Returns:
        Crops and rejections. Those of one photo are consecutive.
    """
    known = duplicates or Duplicates(config.max_duplicate_distance)
    total = len(photos.photos)
    wanted = [p for p in photos.photos if skip is None or not skip(p.key)]
    num_done = total - len(wanted)
    if progress is not None:
        progress(num_done, total)
    if not wanted:
        return
    detector = None
    if config.detect != "none":
        from dinogen.prepare.faces.detect import FaceDetector

        detector = FaceDetector(device, config.min_face, landmark_offset)
    with _workers(config.num_threads, detector) as pool:
        for result in _results(wanted, config, detector, pool):
            yield from _compare(result, config, known, with_captions)
            num_done += 1
            if progress is not None:
                progress(num_done, total)


def _compare(
    result: Result, config: FacesConfig, known: Duplicates, with_captions: bool
) -> Iterator[Crop | Rejection]:
    """Drop crops that duplicate earlier ones, and give the others their keys."""
    kept: list[tuple[str, Candidate]] = []
    rejected = list(result.rejected)
    for candidate in result.candidates:
        key = face_key(result.photo.key, len(kept))
        if candidate.phash is not None:
            twin = known.find(candidate.phash)
            if twin is not None:
                detail = f"differs from {twin[0]} in {twin[1]} of 64 bits"
                rejected.append(("duplicate", detail))
                continue
            known.add(key, candidate.phash)
        kept.append((key, candidate))
    caption, bad = None, ""
    if kept and with_captions:
        caption, bad = try_caption(result.photo.caption)
    for number, (key, candidate) in enumerate(kept):
        meta = {**candidate.meta, "num_crops": len(kept)}
        if number == 0:
            meta["rejected"] = [list(item) for item in rejected]
        yield Crop(key, candidate.image, config.format, meta, caption, result.file)
    for reason, detail in rejected:
        yield Rejection(result.photo.source, reason, detail, result.file)
    if bad:
        yield Rejection(result.photo.source, BAD_CAPTION, bad, result.file)


@contextmanager
def _workers(num_threads: int, detector: FaceDetector | None) -> Iterator[ThreadPoolExecutor]:
    """Threads in which torch starts no threads of its own; the caller's setting is kept."""
    with ThreadPoolExecutor(num_threads, "faces") as pool:
        if detector is not None:
            _limit_torch(pool, num_threads)
        try:
            yield pool
        finally:
            pool.shutdown(cancel_futures=True)


def _limit_torch(pool: ThreadPoolExecutor, num_threads: int) -> None:
    import torch

    before = torch.get_num_threads()
    everyone = threading.Barrier(num_threads)

    def limit() -> None:
        torch.set_num_threads(1)
        everyone.wait()  # so that each thread runs this once

    for future in [pool.submit(limit) for _ in range(num_threads)]:
        future.result()
    # Matrix products have one setting for the whole process, and the threads changed it.
    torch.set_num_threads(before)


def _results(
    photos: Sequence[Photo],
    config: FacesConfig,
    detector: FaceDetector | None,
    pool: ThreadPoolExecutor,
) -> Iterator[Result]:
    """Results in the order of the photos; the next group is read while this one is used."""
    batched = detector is not None and detector.prefers_batches

    def start(group: list[Photo]) -> list[Future[Any]]:
        if batched:
            return [pool.submit(read, photo, config) for photo in group]
        return [pool.submit(read_and_cut, photo, config, detector) for photo in group]

    def finish(group: list[Photo], futures: list[Future[Any]]) -> Iterator[Result]:
        if not batched:
            yield from (future.result() for future in futures)
            return
        assert detector is not None
        photo_pixels = [future.result() for future in futures]
        good = [pixels for pixels in photo_pixels if not isinstance(pixels, Unusable)]
        found = iter(detector.detect(good, config.batch))
        results = [
            pool.submit(cut, photo, pixels, config, None)
            if isinstance(pixels, Unusable)
            else pool.submit(cut, photo, pixels, config, next(found))
            for photo, pixels in zip(group, photo_pixels, strict=True)
        ]
        yield from (future.result() for future in results)

    pending: tuple[list[Photo], list[Future[Any]]] | None = None
    for group in _groups(photos, config, pool):
        futures = start(group)
        if pending is not None:
            yield from finish(*pending)
        pending = (group, futures)
    if pending is not None:
        yield from finish(*pending)


def _groups(
    photos: Sequence[Photo], config: FacesConfig, pool: ThreadPoolExecutor
) -> Iterator[list[Photo]]:
    """Runs of photos whose pixels fit into memory together, by their headers."""

    def num_pixels(photo: Photo) -> int:
        try:
            width, height = probe_photo(photo.path, config.max_pixels)
        except Unusable:
            return 0  # reported when it is read
        return width * height

    group: list[Photo] = []
    room = _GROUP_PIXELS
    for start in range(0, len(photos), _GROUP_PHOTOS):
        part = photos[start : start + _GROUP_PHOTOS]
        for photo, pixels in zip(part, pool.map(num_pixels, part), strict=True):
            if group and (pixels > room or len(group) == _GROUP_PHOTOS):
                yield group
                group, room = [], _GROUP_PIXELS
            group.append(photo)
            room -= pixels
    if group:
        yield group
