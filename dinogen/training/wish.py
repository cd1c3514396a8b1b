"""What an evaluation is asked for, beyond what the config says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dinogen.config import ConfigError, MetricsConfig, parse_config
from dinogen.metrics.names import chosen_names
from shards.manifest import SPLITS


@dataclass(frozen=True)
class Wish:
    """What is to be measured, beyond what the run's config says.

    Attributes:
        names: of metrics; those of ``metrics.names``, or all, if empty.
        num_samples: pictures that are generated, or the first so many of a folder, and at most
            as many held-out samples; ``metrics.num_samples`` and all of them if None.
        split: of held-out samples and real pictures; val and ``metrics.reference_split`` if None.
        reference: packed shards, or a folder of pictures, to compare with; the run's own data if
            None.
        changes: ``metrics.KEY=VALUE`` items.
    """

    names: tuple[str, ...] = ()
    num_samples: int | None = None
    split: str | None = None
    reference: str | None = None
    changes: tuple[str, ...] = ()

    def settings(self, metrics: MetricsConfig) -> MetricsConfig:
        """The section ``metrics:`` as wished.

        Raises:
            ConfigError: a change is of another section, or not known; or a metric or split is not.
        """
        for item in self.changes:
            if not item.startswith("metrics."):
                raise ConfigError(f"{item}: only keys of metrics: can be changed here")
        stated = parse_config({"metrics": metrics.model_dump(mode="json")}, self.changes).metrics
        changes: dict[str, Any] = {
            "names": chosen_names(self.names, "--metrics")
            if self.names
            else chosen_names(stated.names, "metrics.names"),
            "num_samples": self.num_samples or stated.num_samples,
        }
        if self.split is not None:
            if self.split not in SPLITS:
                raise ConfigError(f"--split {self.split}: splits are {', '.join(SPLITS)}")
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
