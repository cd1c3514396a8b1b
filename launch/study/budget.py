"""How long the runs of a study train where its plan says so: in images, or in minutes.

What a run computes depends on its config, its seed and the images it has seen, so minutes become
images once, at the measured speed of each config. They are kept in ``STUDY/budget.json``, and every
later start uses them: a study that goes on is the same study.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dinogen.config import FAMILY_PLACES, Config, ConfigError
from dinogen.config.study import Length
from dinogen.errors import UserError
from dinogen.files import write_json
from dinogen.report.progress import rounded
from dinogen.runs.files import read_object

BUDGET = "budget.json"
FORMAT = 1

# Keys that change neither what a step computes nor how long it takes.
_NO_MATTER: dict[str, Any] = {
    "run": True,
    "seed": True,
    "prepare": True,
    "checkpoint": True,
    "log": True,
    "logging": True,
    "cluster": True,
    "notes": True,
    "metrics": True,
    "eval": True,
    "family": {"file": True, **FAMILY_PLACES},
    "guide": {"file", "path", "revision"},
    "guides": {"__all__": {"file", "path", "revision"}},
    "clip": {"path", "revision"},
    "data": {"path", "mix", "num_threads", "cache_dir", "cache_gb"},
    "engine": {"max_nonfinite"},
    "stages": {"__all__": {"kimg", "epochs", "fade_kimg", "warmup_kimg", "decay_kimg"}},
}


@dataclass(frozen=True)
class Measured:
    """The measured speed of a config, and the images that it is given for its minutes.

    Attributes:
        minutes: what the plan gives it.
        kimg: thousands of images of all stages together.
        images_per_s: of its steps, by stage: ``{"32x32": 81.5}``.
        device: such as ``cpu`` or ``NVIDIA H100``.
        num_processes: number of processes that shared the work.
        config: :func:`fingerprint` of what was measured.
        when: in local time.
    """

    minutes: float
    kimg: float
    images_per_s: Mapping[str, float]
    device: str
    num_processes: int
    config: str
    when: str

    @property
    def words(self) -> str:
        """The images, and the speeds behind them."""
        speeds = ", ".join(f"{rounded(one, 3)}/s" for one in self.images_per_s.values())
        words = f"{rounded(self.kimg, 4)} k images in {self.minutes:g} minutes"
        return f"{words}, at {speeds} on {self.num_processes}x {self.device}"


@dataclass(frozen=True)
class Budget:
    """The minutes of a config of a track, or of the final.

    Attributes:
        key: its name in budget.json, which its runs share: ``TRACK/CONFIG``.
        minutes: what the plan gives it.
        file: budget.json.
        measured: None as long as its speed is not known.
    """

    key: str
    minutes: float
    file: Path
    measured: Measured | None


@dataclass
class Budgets:
    """What budget.json holds.

    Attributes:
        path: the file.
        measured: by :attr:`Budget.key`.
    """

    path: Path
    measured: dict[str, Measured] = field(default_factory=dict)

    def add(self, key: str, measured: Measured) -> None:
        """Add one, and write the file, whole or not at all."""
        self.measured[key] = measured
        configs = {name: asdict(one) for name, one in self.measured.items()}
        write_json(self.path, {"format": FORMAT, "configs": configs})


def read_budgets(folder: Path) -> Budgets:
    """What was measured for the study in a folder; nothing if there is no file.

    Raises:
        UserError: it is damaged, or a later version of dinogen wrote it. It is not ignored: with
            speeds measured again the runs would be others.
    """
    path = folder / BUDGET
    found = read_object(path)
    if not found.there:
        return Budgets(path)
    data = found.value or {}
    try:
        if found.problems or data["format"] != FORMAT:
            raise ValueError("; ".join(found.problems).strip() or f"format {data['format']}")
        measured = {key: Measured(**one) for key, one in data["configs"].items()}
        if not all(min(one.kimg, *one.images_per_s.values()) > 0 for one in measured.values()):
            raise ValueError("a length or a speed is not above 0")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(
            f"{path}: cannot be read ({error}): it says how many images the runs of the study "
            "train for: restore it from a copy; without one, move it and the runs of all tracks "
            "with minutes away, and their speed is measured again"
        ) from None
    return Budgets(path, measured)


def fingerprint(config: Config) -> str:
    """SHA-256 of the part of a config that its speed depends on.

    Only keys that differ from their defaults: those that a later version adds do not change it.
    """
    dumped = config.model_dump(mode="json", exclude=_NO_MATTER, exclude_defaults=True)
    kept = {key: value for key, value in dumped.items() if value != {}}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def find_budget(folder: Path, key: str, length: Length, config: Config) -> Budget | None:
    """The minutes that a config is given; None if its length is not in minutes.

    A speed that was measured for other minutes does not count. One that was measured with another
    config counts only once a run has begun with it: whether its config may differ is said by the
    comparison with what the run was trained with.

    Args:
        folder: of the study.
        key: see :attr:`Budget.key`.
        length: section of its track, or of the final.
        config: as it is trained, but for its length.

    Raises:
        UserError: budget.json is damaged.
    """
    if length.minutes is None:
        return None
    budgets = read_budgets(folder)
    measured = budgets.measured.get(key)
    if measured is not None:
        same = measured.config == fingerprint(config) or _has_begun(folder, key)
        measured = measured if same and measured.minutes == length.minutes else None
    return Budget(key, length.minutes, budgets.path, measured)


def _has_begun(folder: Path, key: str) -> bool:
    """Whether a run of a config has begun: then its config was copied into the study's folder."""
    track, _, label = key.partition("/")
    copies = (folder / "configs" / track).glob("*.yaml")
    return any(re.fullmatch(rf"{re.escape(label)}-seed\d+", one.stem) for one in copies)


def length_changes(config: Config, kimg: float, measurements: int | None, where: str) -> list[str]:
    """Changes that give a run a length in images, its stages in the same proportions.

    Fade-ins, warm-ups and decays are stretched with their stage, if its config gives both in
    images.

    Args:
        config: the run.
        kimg: thousands of images of all stages together.
        measurements: how often ``eval.generated`` is measured; None for as in the config.
        where: file and key, for errors.

    Raises:
        ConfigError: its stages are not all in kimg or all in epochs.
    """
    changes = []
    for number, (stage, share) in enumerate(
        zip(config.stages, stage_shares(config, where), strict=True)
    ):
        length = kimg * share
        changes += [f"stages.{number}.kimg={length:.12g}", f"stages.{number}.epochs=null"]
        if stage.kimg is None:
            continue
        for key in ("fade_kimg", "warmup_kimg", "decay_kimg"):
            if value := getattr(stage, key):
                # rounded down, for the parts of a stage may not be longer than the stage
                scaled = value / stage.kimg * length * (1 - 1e-9)
                changes.append(f"stages.{number}.{key}={scaled:.12g}")
    if measurements is not None:
        changes.append(f"eval.every_kimg={kimg / measurements:.12g}")
    return changes


def stage_shares(config: Config, where: str) -> list[float]:
    """The share of each stage in the length of a run; they add up to 1.

    Raises:
        ConfigError: some are in kimg and some in epochs.
    """
    if len({stage.kimg is None for stage in config.stages}) > 1:
        raise ConfigError(
            f"{where}: some of its stages have kimg and some have epochs: use one of them for "
            "all, or set the lengths in overrides"
        )
    sizes = [stage.kimg or stage.epochs or 0.0 for stage in config.stages]
    return [size / sum(sizes) for size in sizes]


def total_kimg(minutes: float, shares: Sequence[float], images_per_s: Sequence[float]) -> float:
    """Thousands of images that stages of these shares and speeds show in some minutes.

    Of N images, stage i takes ``N * share_i / speed_i`` seconds. At least one image.
    """
    per_image = sum(share / speed for share, speed in zip(shares, images_per_s, strict=True))
    return max(1, round(minutes * 60 / per_image)) / 1000
