"""Measures a folder of pictures, whoever made them, as a run's own are measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dinogen.config import ConfigError, MetricsConfig
from dinogen.distributed import process_group
from dinogen.distributed.failure import takedown
from dinogen.evaluation.record import Tell, figure_teller, find_place, write_result
from dinogen.evaluation.request import Wish
from dinogen.evaluation.subject import reference_at
from dinogen.metrics.extractors.load import Judges
from dinogen.metrics.registry import GUIDE_DIVERSITY
from dinogen.metrics.sources import Folder, picture_files
from dinogen.metrics.suite import Subject, measure
from dinogen.training.state import versions


def is_folder_of_pictures(path: Path) -> bool:
    """Whether ``path`` holds pictures and no run."""
    return not (path / "config.yaml").is_file() and bool(picture_files(path))


def evaluate_folder(
    folder: Path,
    num_samples: int | None = None,
    *,
    split: str | None = None,
    names: Sequence[str] = (),
    reference: str | None = None,
    changes: Sequence[str] = (),
    out: Path | None = None,
    tell: Tell | None = None,
) -> dict[str, Any]:
    """Measure image files, whoever made them, and write ``FOLDER/evaluation.json``.

    Args:
        folder: of the files.
        num_samples: the first so many; all unless given.
        split: see :class:`Wish`, as for the others.
        names: likewise.
        reference: likewise; without it there are only figures that compare with nothing.
        changes: likewise.
        out: file (``*.json``) or folder to write to; ``folder`` unless given.
        tell: told on rank 0 what is known so far, in parts of the result, as soon as it is.

    Returns:
        The result as written, with ``measured`` and ``fingerprints`` as in :func:`evaluate`.

    Raises:
        UserError: no file can be measured, or the reference does not fit.
    """
    wish = Wish(tuple(names), num_samples, split, reference, tuple(changes))
    process_group.use_device("auto")
    process_group.init()
    process_group.set_cpu_threads()
    with takedown():
        settings = wish.settings(MetricsConfig())
        place = find_place(folder, out)
        pictures = Folder(folder, num_samples)
        real, train = reference_at(reference, settings, pictures.resolution)
        none = ConfigError("a folder holds pictures and no network")
        asked = [name for name in settings.names if name != GUIDE_DIVERSITY]
        subject = Subject(pictures, real, train, none, none)
        judges = Judges(settings, process_group.device())
        result = {
            "folder": str(folder),
            "pictures": pictures.facts()["data"],
            "resolution": pictures.resolution,
            "num_samples": pictures.num,
            "left_out": pictures.left_out,
            "world_size": process_group.world_size(),
            "device": str(process_group.device()),
            "versions": versions(),
        }
        if tell is not None and process_group.is_main():
            tell(result)
        teller = figure_teller(tell)
        found = measure(asked, judges, subject, settings.num_bootstrap, settings.cache, teller)
        return write_result(place, result, found, None, [str(folder), *wish.words()])
