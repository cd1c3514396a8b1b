"""``summary.json``: the outcome of each file in a folder of photos, in numbers that add up."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from dinogen.prepare.photos.find import Photos, counted, left_out_words
from dinogen.prepare.photos.read import NO_CLASS

SUMMARY = "summary.json"


@dataclass(frozen=True)
class FacesSummary:
    """The outcome for a folder of photos.

    ``num_files = num_used + num_rejected + sum(left_out.values()) + num_sidecars``.

    Attributes:
        num_files: files seen, without hidden ones.
        num_photos: of these, photos by suffix or content: ``num_used + num_rejected``.
        num_used: photos with a crop.
        num_rejected: photos without a crop.
        left_out: number of files that are not read as photos, by suffix.
        num_sidecars: text and metadata files, such as captions.
        num_hidden: hidden and system files and folders that were skipped.
        num_skipped: photos done by an earlier run.
        num_crops: crops in the folder or dataset now, including those of earlier runs.
        num_new: of these, crops of this run.
        num_withdrawn: photos of an earlier run that are gone.
        num_removed: their crops, which were removed.
        num_replaced: photos whose file was replaced; their crops were made again.
        num_captions_not_read: captions that were not read, because the config has no clip.
        rejected: number of lines in ``rejected.csv`` for each reason, most frequent first. One
            photo may have several: one for each face, and one for a caption that cannot be used.
        seconds: of this run.
    """

    num_files: int
    num_photos: int
    num_used: int
    num_rejected: int
    left_out: dict[str, int]
    num_sidecars: int
    num_hidden: int
    num_skipped: int
    num_crops: int
    num_new: int
    num_withdrawn: int = 0
    num_removed: int = 0
    num_replaced: int = 0
    num_captions_not_read: int = 0
    rejected: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0


def summary_of(
    photos: Photos,
    used: Collection[str],
    reasons: Iterable[str],
    *,
    with_captions: bool,
    num_skipped: int,
    num_crops: int,
    num_new: int,
    num_withdrawn: int = 0,
    num_removed: int = 0,
    num_replaced: int = 0,
    seconds: float,
) -> FacesSummary:
    """The summary of a run.

    Args:
        photos: what was found.
        used: sources of the photos that have a crop.
        reasons: of each line of ``rejected.csv``.
        with_captions: whether captions were read.
        num_skipped: as in :class:`FacesSummary`, as are the others.
    """
    return FacesSummary(
        num_files=photos.num_files,
        num_photos=len(photos.photos),
        num_used=len(used),
        num_rejected=len(photos.photos) - len(used),
        left_out=photos.left_out,
        num_sidecars=photos.num_sidecars,
        num_hidden=photos.num_hidden,
        num_skipped=num_skipped,
        num_crops=num_crops,
        num_new=num_new,
        num_withdrawn=num_withdrawn,
        num_removed=num_removed,
        num_replaced=num_replaced,
        num_captions_not_read=0 if with_captions else sum(p.has_caption for p in photos.photos),
        rejected=dict(Counter(reasons).most_common()),
        seconds=round(seconds, 3),
    )


def account(summary: FacesSummary) -> list[str]:
    """The summary as lines of text; every file that was seen is counted once."""
    num_left_out = sum(summary.left_out.values())
    lines = [
        f"{counted(summary.num_files, 'file')} seen: {summary.num_used} used, "
        f"{summary.num_rejected} rejected, {num_left_out} left out, {summary.num_sidecars} text "
        "or metadata"
    ]
    if summary.num_hidden:
        lines.append(f"{summary.num_hidden} hidden or system files and folders skipped")
    if num_loose := summary.rejected.get(NO_CLASS):
        lines.append(
            f"  {NO_CLASS}: {counted(num_loose, 'photo')} outside the class folders: move "
            f"{'it' if num_loose == 1 else 'them'} into one"
        )
    lines += left_out_words(summary.left_out)
    if summary.num_withdrawn:
        lines.append(withdrawn_words(summary.num_withdrawn, summary.num_removed))
    if summary.num_replaced:
        lines.append(replaced_words(summary.num_replaced))
    if summary.num_captions_not_read:
        lines.append(
            f"{counted(summary.num_captions_not_read, 'caption')} not read: the config has no "
            "clip: section"
        )
    return lines


def withdrawn_words(num_photos: int, num_crops: int) -> str:
    """``1 photo was removed: its 1 crop was removed too``."""
    whose = "its" if num_photos == 1 else "their"
    return (
        f"{counted(num_photos, 'photo', 'was', 'were')} removed: {whose} "
        f"{counted(num_crops, 'crop', 'was', 'were')} removed too"
    )


def replaced_words(num_photos: int) -> str:
    """``1 photo was replaced: its crops are made again``."""
    whose = "its" if num_photos == 1 else "their"
    return f"{counted(num_photos, 'photo', 'was', 'were')} replaced: {whose} crops are made again"
