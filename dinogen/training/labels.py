"""Labels of the data against the family's classes: in the manifest, and as samples are read."""

from __future__ import annotations

from dinogen.config import Config, ConfigError
from dinogen.families.base import Batch, Family
from shards.dataset import Dataset


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
