"""What an evaluation is asked for, beyond what the config says."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from dinogen.config import ConfigError, MetricsConfig, parse_config
from dinogen.metrics.registry import chosen_names
from shards.format.manifest import SPLITS

# Stands among the names of metrics for what the family itself measures: held-out samples, a probe.
HELD_OUT = "held_out"
# Where things lie that may have moved since: what they hold is compared by hashes.
PLACES = re.compile(
    r"data\.(path|mix|cache_dir|cache_gb|num_threads)(?=[.=])"
    r"|(guide|clip|guides\.\w+)\.(path|revision)(?==)"
)


@dataclass(frozen=True)
class Wish:
    """What is to be measured, beyond what the run's config says.

    Attributes:
        names: of metrics, and ``held_out`` for what the family itself measures; those of
            ``metrics.names``, or all, and ``held_out``, if empty.
        num_samples: images that are generated, or the first so many of a folder, and at most
            as many held-out samples; ``metrics.num_samples`` and all of them if None.
        split: of held-out samples and real images; val and ``metrics.reference_split`` if None.
        reference: packed shards, or a folder of images, to compare with; the run's own data if
            None.
        changes: ``metrics.KEY=VALUE`` items, and places such as ``data.path=FOLDER``.
    """

    names: tuple[str, ...] = ()
    num_samples: int | None = None
    split: str | None = None
    reference: str | None = None
    changes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_changes(self.changes)
        if self.split is not None and self.split not in SPLITS:
            raise ConfigError(f"--split {self.split}: splits are {', '.join(SPLITS)}")

    @property
    def held_out(self) -> bool:
        """Whether the family's own figures are asked for."""
        return not self.names or HELD_OUT in self.names

    @property
    def places(self) -> tuple[str, ...]:
        """Changes that say where something lies."""
        return tuple(item for item in self.changes if not item.startswith("metrics."))

    def settings(self, metrics: MetricsConfig) -> MetricsConfig:
        """The section ``metrics:`` as it is asked for; without names if only ``held_out`` is.

        Raises:
            ConfigError: a change or a metric is not known.
        """
        own = [item for item in self.changes if item.startswith("metrics.")]
        stated = parse_config({"metrics": metrics.model_dump(mode="json")}, own).metrics
        names = [name for name in self.names if name != HELD_OUT]
        changes: dict[str, Any] = {
            "names": chosen_names(names, "--metrics")
            if names
            else ()
            if self.names
            else chosen_names(stated.names, "metrics.names"),
            "num_samples": self.num_samples or stated.num_samples,
        }
        if self.split is not None:
            changes["reference_split"] = self.split
        return stated.model_copy(update=changes)

    def words(self) -> list[str]:
        """The same as options of ``dinogen evaluate``."""
        options = {
            "--metrics": ",".join(self.names),
            "--num-samples": self.num_samples,
            "--split": self.split,
            "--reference": self.reference,
        }
        given = {option: str(value) for option, value in options.items() if value}
        return [word for pair in given.items() for word in pair] + list(self.changes)


def check_changes(changes: tuple[str, ...]) -> None:
    """Refuse changes of what a run has learnt from.

    Raises:
        ConfigError: naming the first.
    """
    for item in changes:
        if not item.startswith("metrics.") and not PLACES.match(item):
            raise ConfigError(
                f"{item}: only keys of metrics: and places, such as data.path= and guide.path=, "
                "can be changed here"
            )
