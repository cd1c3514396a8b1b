"""Classes of photos: the first folder below those searched, numbered in the order of its name."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from dinogen.prepare.read import PrepareError


def class_names(src: Path, sources: Iterable[str]) -> tuple[str, ...]:
    """Names of the classes, sorted; a class's label is its place among them, from 0.

    Args:
        src: folder of the photos, named in errors.
        sources: the photos' paths relative to it.

    Raises:
        PrepareError: a photo lies in none of the folders, or there is but one folder.
    """
    names = set()
    for source in sources:
        name, slash, _ = source.partition("/")
        if not slash:
            raise PrepareError(
                f"{src / source}: lies beside the folders that are the classes "
                "(prepare.faces.classes=folders): move it into one of them, or out of the way"
            )
        names.add(name)
    if len(names) < 2:
        raise PrepareError(
            f"{src}: {'one class alone, ' + names.pop() if names else 'no class'}: make a folder "
            "per class in it, or leave out prepare.faces.classes=folders"
        )
    return tuple(sorted(names))


def label_of(source: str, classes: Sequence[str]) -> int | None:
    """Number of a photo's class; None if there are no classes.

    Args:
        source: the photo's path relative to the folder searched.
        classes: as :func:`class_names` gives them.
    """
    return classes.index(source.partition("/")[0]) if classes else None
