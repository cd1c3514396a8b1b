"""The schema of a study file: tracks of configs, what decides between them, and the final."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, model_validator

from dinogen.config.base import Section, describe_errors, read_mapping
from dinogen.config.search import OF_THE_STUDY, SearchConfig
from dinogen.errors import ConfigError

# Folders of a study that are not tracks.
FINAL = "final"
OWN_FOLDERS = ("configs", "logs", "report")

_LENGTH = r"stages\.\d+\.(kimg|epochs)"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def _check_overrides(items: tuple[str, ...]) -> tuple[str, ...]:
    for item in items:
        key, found, _ = item.partition("=")
        if not found or not key.strip():
            raise ValueError(f"'{item}': write key=value, as in stages.0.epochs=200")
        if key.strip() in OF_THE_STUDY:
            raise ValueError(f"'{item}': the study sets the folder and the seed of each run")
    return items


def _check_seeds(seeds: tuple[int, ...]) -> tuple[int, ...]:
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"{list(seeds)}: a seed occurs twice, which would be the same run")
    return seeds


def _as_entry(value: Any) -> Any:
    """A config's name alone is an entry without changes."""
    return {"config": value} if isinstance(value, str) else value


def check_name(name: str) -> str:
    """A name that can be a folder.

    Raises:
        ValueError: it cannot.
    """
    if not _NAME.fullmatch(name):
        raise ValueError(f"'{name}' cannot be a folder name: use letters, digits, '.', '_', '-'")
    return name


Overrides = Annotated[tuple[str, ...], AfterValidator(_check_overrides)]
Seeds = Annotated[
    tuple[Annotated[int, Field(ge=0, lt=2**63)], ...],
    Field(min_length=1),
    AfterValidator(_check_seeds),
]


class EntryConfig(Section):
    """One config of a track."""

    config: Path = Field(..., description="YAML file of a run; relative to the study's file")
    name: str | None = Field(None, description="its name in the study; default: the file's name")
    overrides: Overrides = Field((), description="changes to it: stages.0.epochs=50")

    @property
    def label(self) -> str:
        """Its name in the study."""
        return self.name or self.config.stem

    @model_validator(mode="after")
    def _check(self) -> EntryConfig:
        check_name(self.label)
        return self


class Length(Section):
    """How long the runs of a track or of the final train; as in their configs if none is given."""

    kimg: float | None = Field(
        None,
        gt=0,
        description="length of each run in thousands of images, divided among its stages in "
        "proportion to their length",
    )
    minutes: float | None = Field(
        None,
        gt=0,
        description="the same as time: each config trains for as many images as this machine "
        "shows in these minutes; measured once, and kept in the study's budget.json",
    )
    measurements: int | None = Field(
        None,
        ge=1,
        description="eval.generated is measured this often in each run, at equal distances; "
        "default: as in the configs",
    )

    @model_validator(mode="after")
    def _one_length(self) -> Length:
        given = [name for name in ("kimg", "minutes", "epochs") if getattr(self, name, None)]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} both say how long a run is: give one of them")
        if self.measurements is not None and not {"kimg", "minutes"} & set(given):
            raise ValueError(
                "measurements divides a length in images: give kimg or minutes too, or set "
                "eval.every_kimg in overrides"
            )
        return self


class TrackConfig(Length):
    """Configs that are compared with each other."""

    configs: tuple[Annotated[EntryConfig, BeforeValidator(_as_entry)], ...] = Field(
        ..., min_length=1, description="files, or mappings of config, name and overrides"
    )
    overrides: Overrides = Field((), description="changes to all of them")
    seeds: Seeds = Field((0,), description="each config is trained once with each seed")

    @model_validator(mode="after")
    def _names_once(self) -> TrackConfig:
        names = [entry.label for entry in self.configs]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"configs: '{min(twice)}' occurs twice: give one another name")
        return self


class FinalConfig(Length):
    """The best of each track, trained again under equal conditions."""

    tracks: tuple[str, ...] = Field((), description="tracks whose best take part; all if empty")
    epochs: float | None = Field(
        None,
        gt=0,
        description="the same in epochs of the data; default of all three: as in its track",
    )
    overrides: Overrides = Field((), description="changes to all of them, applied last")
    seeds: Seeds = Field((0,), description="each config is trained once with each seed")


class StudyConfig(Section):
    """A whole study."""

    folder: Path = Field(Path("runs/study"), description="folder of all its output")
    title: str = Field("Study", description="heading of its report")
    metric: str = Field("fid", description="metric that the best of a track is chosen by")
    overrides: Overrides = Field((), description="changes to every config")
    tracks: dict[str, TrackConfig] = Field(
        ..., min_length=1, description="tracks by name, such as gan"
    )
    search: SearchConfig | None = Field(
        None, description="trials in the place of some configs; none if left out"
    )
    final: FinalConfig | None = Field(None, description="last comparison; none if left out")

    @model_validator(mode="after")
    def _check(self) -> StudyConfig:
        for name in self.tracks:
            check_name(name)
            if name in (FINAL, *OWN_FOLDERS):
                raise ValueError(
                    f"tracks.{name}: the study uses a folder of this name: rename the track"
                )
        for name in self.final.tracks if self.final else ():
            if name not in self.tracks:
                raise ValueError(f"final.tracks: there is no track '{name}'")
        for name in self.search.over if self.search else ():
            self._check_searched(name)
        if self.search is not None:
            self._check_lengths(self.search)
        return self

    def _check_lengths(self, search: SearchConfig) -> None:
        """The length of trials is not measured, and is said once."""
        sections: dict[str, Length] = {f"tracks.{name}": one for name, one in self.tracks.items()}
        if self.final is not None:
            sections["final"] = self.final
        for key, section in sections.items():
            tracks = self.final_tracks if key == "final" else (key.partition(".")[2],)
            labels = [(name, one.label) for name in tracks for one in self.tracks[name].configs]
            if not any(self.searched(*one) for one in labels):
                continue
            if section.minutes is not None:
                raise ValueError(
                    f"{key}.minutes: the speed of a trial depends on its values, and the trials of "
                    "search are as many images long as each other: give kimg"
                )
            lengths = [one for one in search.parameters if re.fullmatch(_LENGTH, one)]
            if section.kimg is not None and lengths and key != "final":
                raise ValueError(
                    f"{key}.kimg: search.parameters.{lengths[0]} is a length too: leave one out"
                )

    def _check_searched(self, name: str) -> None:
        """A name in ``search.over`` is that of one config, which is trained with one seed."""
        known = {
            f"{track}/{entry.label}": track
            for track, section in self.tracks.items()
            for entry in section.configs
        }
        found = [full for full in known if name in (full, full.partition("/")[2])]
        if not found:
            near = difflib.get_close_matches(name, [*known, *(k.split("/")[1] for k in known)], 1)
            hint = f"did you mean '{near[0]}'?" if near else f"there are {', '.join(known)}"
            raise ValueError(f"search.over: no track has a config '{name}': {hint}")
        if len(found) > 1:
            raise ValueError(f"search.over: '{name}' is ambiguous: write {' or '.join(found)}")
        if len(self.tracks[known[found[0]]].seeds) > 1:
            raise ValueError(
                f"search.over: {found[0]}: a trial is one run, but tracks.{known[found[0]]} has "
                "several seeds: give it one, and repeat the best in the final"
            )

    def searched(self, track: str, label: str) -> bool:
        """Whether trials take the place of a config."""
        return self.search is not None and bool({label, f"{track}/{label}"} & set(self.search.over))

    @property
    def final_tracks(self) -> tuple[str, ...]:
        """Tracks whose best go into the final."""
        if self.final is None:
            return ()
        return self.final.tracks or tuple(self.tracks)


def load_study(path: Path) -> StudyConfig:
    """Read a study's file.

    Raises:
        ConfigError: naming the file and key, with the nearest valid name or the remedy.
    """
    try:
        return StudyConfig.model_validate(read_mapping(path))
    except ValidationError as error:
        raise ConfigError(describe_errors(error, StudyConfig, str(path))) from None
