"""Labels of the data against the family's classes: in the manifest, and as samples are read."""

from __future__ import annotations

import logging

import numpy as np
import numpy.typing as npt

from dinogen import dist
from dinogen.config import Config, ConfigError
from dinogen.errors import UserError
from dinogen.families.base import Batch, Family
from shards.errors import ShardsError
from shards.read.dataset import Dataset

log = logging.getLogger(__name__)

_LABELS = 1 << 14  # read at a time


def check_classes(config: Config, data: Dataset) -> None:
    """Classes that the manifest tells of against the family's ``num_classes``.

    Raises:
        ConfigError: naming ``family.num_classes``.
    """
    path, wanted = config.data.location, config.family.options.get("num_classes")
    if not data.manifest.has_labels:
        fault = data.label_fault(config.data.split)
        raise ConfigError(
            f"family.num_classes: the samples of {path} have no labels"
            f"{f' that are numbers ({fault})' if fault else ''}: prepare photos in one folder per "
            "class (docs/data-format.md), or set it to 0"
        )
    classes = data.manifest.classes
    if classes and len(classes) != wanted:
        raise ConfigError(
            f"family.num_classes: {wanted}, but {path} has {len(classes)} classes "
            f"({', '.join(classes)}): set it to {len(classes)}"
        )


def class_shares(family: Family, data: Dataset | UserError) -> tuple[float, ...] | None:
    """How frequent each class is among what a family is trained on; every rank has to call it.

    Args:
        family: reads labels.
        data: of its run; a mix counts each dataset by its weight.

    Returns:
        Shares by label, their sum 1; None, with a warning, where the data are not available or
        hold labels of no class: samples are then of each class in turn.
    """
    num_classes = int(family.config.family.options.get("num_classes") or 0)
    shares = np.zeros(num_classes)
    failure: Exception | None = data if isinstance(data, UserError) else None
    try:
        if not isinstance(data, UserError):
            total = float(sum(data.weights))
            for one, weight in zip(data.sets, data.weights, strict=True):
                counts = _counts(one, family.config.data.split, num_classes)
                shares += float(weight) / total * counts / counts.sum()
    except (ShardsError, ValueError, OSError) as error:
        failure = error
    if dist.any_rank(failure is not None):
        if dist.is_main():
            log.warning(
                "CLASSES IN TURN: how frequent each is in the data is not known (%s), so figures "
                "compare with no others but such",
                failure or "on another rank",
            )
        return None
    return tuple(shares.tolist())


def _counts(data: Dataset, split: str, num_classes: int) -> npt.NDArray[np.float64]:
    """Samples of a split by their label."""
    num = data.num_samples(split)
    counts = np.zeros(num_classes)
    for start in range(0, num, _LABELS):
        batch = data.read(list(range(start, min(start + _LABELS, num))), split=split)
        found = np.bincount(batch["label"].numpy(), minlength=num_classes)
        if len(found) > num_classes:
            raise ConfigError(f"{data.location}: label {len(found) - 1} is none of the classes")
        counts += found
    if not counts.sum():
        raise ConfigError(f"{data.location}: split {split} has no samples")
    return counts


def check_labels(family: Family, batch: Batch) -> None:
    """Refuse labels that are none of the family's classes, where it reads them.

    A manifest need not name classes, and to read the labels of all shards first would fetch every
    index of what lies behind a URL. On a GPU such a label ends in an assertion that names nothing.

    Args:
        family: reads the batch.
        batch: on the CPU.

    Raises:
        ConfigError: naming ``family.num_classes`` and a sample.
    """
    num_classes = family.config.family.options.get("num_classes")
    if not family.inputs.labels or num_classes is None:
        return
    for key, label in zip(batch["key"], batch["label"].tolist(), strict=True):
        if not 0 <= label < num_classes:
            mend = f"set it to {label + 1} or more" if label > 0 else "labels begin at 0"
            raise ConfigError(
                f"family.num_classes: {num_classes}, but sample {key} of "
                f"{family.config.data.location} has label {label}: {mend}, or pack the data again "
                "with labels from 0"
            )
