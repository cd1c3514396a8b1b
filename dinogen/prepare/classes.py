"""Classes of photos: the first folder below those searched, numbered in the order of its name."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from dinogen.prepare.read import PrepareError

NO_CLASS = "no_class"
NO_CLASS_REMEDY = "lies beside the folders that are the classes: move it into one of them"


def class_names(src: Path, sources: Iterable[str]) -> tuple[str, ...]:
    """Names of the classes, sorted; a class's label is its place among them, from 0.

    Photos beside the folders have none (:func:`has_class`), and are rejected one by one.

    Args:
        src: folder of the photos, named in errors.
        sources: the photos' paths relative to it.

    Raises:
        PrepareError: there are fewer than two folders.
    """
    names = {source.partition("/")[0] for source in sources if has_class(source)}
    if len(names) < 2:
        raise PrepareError(
            f"{src}: {'one class alone, ' + names.pop() if names else 'no class'}: make a folder "
            "per class in it, or leave out prepare.faces.classes=folders"
        )
    return tuple(sorted(names))


def has_class(source: str) -> bool:
    """Whether a photo lies in one of the folders below the one searched."""
    return "/" in source


def label_of(source: str, classes: Sequence[str]) -> int | None:
    """Number of a photo's class; None if there are no classes.

    Args:
        source: the photo's path relative to the folder searched.
        classes: as :func:`class_names` gives them.
    """
    return classes.index(source.partition("/")[0]) if classes else None
