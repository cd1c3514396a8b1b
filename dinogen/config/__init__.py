"""The schema of a dinogen YAML file, its overrides and its errors.

Every key of a config is declared here, with its unit and default. An unknown key is an error that
suggests the nearest valid name, because a misspelt option that is silently ignored costs a cluster
job. Options of a family are declared with the family (``Family.Options``) and checked when the
family is built.
"""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from dinogen.config.base import Section as Section
from dinogen.config.base import describe_errors as describe_errors
from dinogen.config.base import find_config, override, read_mapping
from dinogen.config.guides import default_path, known_guides
from dinogen.config.training import AugmentConfig as AugmentConfig
from dinogen.config.training import CheckpointConfig as CheckpointConfig
from dinogen.config.training import ClipConfig as ClipConfig
from dinogen.config.training import ClusterConfig, Sinks
from dinogen.config.training import DataConfig as DataConfig
from dinogen.config.training import EmaConfig as EmaConfig
from dinogen.config.training import EngineConfig as EngineConfig
from dinogen.config.training import EvalConfig as EvalConfig
from dinogen.config.training import LogConfig as LogConfig
from dinogen.config.training import MetricsConfig as MetricsConfig
from dinogen.config.training import OptimConfig as OptimConfig
from dinogen.config.training import ProfileConfig as ProfileConfig
from dinogen.config.training import StageConfig as StageConfig
from dinogen.config.training import StagePlan as StagePlan
from dinogen.config.training import due as due
from dinogen.errors import ConfigError as ConfigError
from dinogen.files import named_folder
from dinogen.runs.layout import CONFIG, has_stages


class FacesConfig(Section):
    """Photo -> square image: an aligned face, or the photo itself."""

    size: int = Field(256, ge=8, le=2048, description="side of the square, pixels")
    detect: Literal["mtcnn", "none"] = Field(
        "mtcnn", description="mtcnn: detect faces; none: use each photo as it is"
    )
    align: Literal["landmarks", "ffhq", "box"] = Field(
        "landmarks",
        description="for faces: landmarks: move five points onto the reference; ffhq: the FFHQ "
        "square; box: a square around the face",
    )
    fit: Literal["crop", "resize"] = Field(
        "crop",
        description="with detect: none: crop: the largest centred square; resize: the whole photo, "
        "squeezed to a square",
    )
    classes: Literal["none", "folders"] = Field(
        "none", description="folders: the first folder below the photos is the class"
    )
    which: Literal["largest", "all"] = Field(
        "largest", description="the largest face of a photo, or every face"
    )
    margin: float = Field(0.3, ge=0, le=4, description="for box: margin as a fraction of its side")
    min_face: int = Field(20, ge=1, description="smallest face box side accepted, pixels")
    min_probability: float = Field(0.95, ge=0, le=1, description="lowest MTCNN probability")
    min_blur: float = Field(
        0.0, ge=0, description="lowest variance of Laplacian of the crop; 0 accepts all"
    )
    max_duplicate_distance: int = Field(
        -1,
        ge=-1,
        le=64,
        description="largest distance of the perceptual hashes of duplicates, in bits; -1: off",
    )
    max_pixels: int = Field(
        100_000_000, ge=1, description="a photo with more pixels is rejected before decoding"
    )
    format: Literal["jpg", "png"] = Field("jpg", description="encoding of the crops")
    quality: int = Field(95, ge=1, le=100, description="JPEG quality (4:4:4 chroma)")
    batch: int = Field(16, ge=1, description="photos of equal size per batch of the detector")
    num_threads: int = Field(2, ge=1, description="threads that decode photos")

    @model_validator(mode="before")
    @classmethod
    def _as_it_was_written_once(cls, values: Any) -> Any:
        # Checkpoints and datasets of older versions contain it.
        if isinstance(values, dict) and values.get("align") == "none":
            return {**values, "align": "landmarks", "detect": "none"}
        return values


class PyramidsConfig(Section):
    """Aligned face -> pyramid of guide features."""

    make: Literal["auto", "always", "never"] = Field(
        "auto", description="auto: unless the config's family reads no pyramids"
    )
    grids: tuple[int, ...] = Field(
        (4, 8, 16), min_length=1, description="grids of the pyramid; pooled has 16, 8, 4, 2 and 1"
    )
    base_grid: Literal[16, 8] = Field(
        16,
        description="pooled levels are means of this grid; with 8 the guide sees a quarter of the "
        "pixels",
    )
    kinds: tuple[Literal["pooled", "native"], ...] = Field(
        ("pooled", "native"),
        min_length=1,
        description="pooled: exact 2x2 means of the base_grid; "
        "native: features of the image shrunk to g x g pixels",
    )
    flips: bool = Field(
        False,
        description="features of each mirrored image too, for families that compare them with "
        "images that augment.flip mirrors; twice the time and the bytes",
    )
    batch: int = Field(32, ge=1, description="images per forward of the guide")
    shard_size: int = Field(256, ge=1, description="images per intermediate part")

    @model_validator(mode="after")
    def _check(self) -> PyramidsConfig:
        if len(set(self.grids)) < len(self.grids) or len(set(self.kinds)) < len(self.kinds):
            raise ValueError("grids and kinds: list each of them once")
        pooled = [grid for grid in (16, 8, 4, 2, 1) if grid <= self.base_grid]
        allowed = set(pooled) if "pooled" in self.kinds else set(range(1, 129))
        if wrong := sorted(set(self.grids) - allowed):
            raise ValueError(
                f"grids: {wrong[0]} is not a pooled grid: use {', '.join(map(str, pooled[:-1]))} "
                "or 1" + (", or base_grid: 16" if self.base_grid < wrong[0] <= 16 else "")
                if "pooled" in self.kinds
                else f"grids: {wrong[0]} is not from 1 to 128"
            )
        return self


class LatentsConfig(Section):
    """Aligned face -> latents of an autoencoder, which families can be trained on instead."""

    path: str = Field(
        min_length=1,
        description="the autoencoder: hub name, hf://user/name[@revision][/path] or folder of an "
        "AutoencoderKL of diffusers, or file of `dinogen export` of a vae with latent_side",
    )
    revision: str | None = Field(None, description="hub revision (commit, tag or branch)")
    flips: bool = Field(
        False, description="latents of each mirrored image too, for augment.flip; twice the bytes"
    )
    batch: int = Field(8, ge=1, description="images per forward of the autoencoder")


class PackConfig(Section):
    """Samples -> tar shards."""

    shard_size: int = Field(1000, ge=1, description="samples per shard")
    val_fraction: float = Field(0.0, ge=0, lt=1, description="fraction of keys in the val split")
    test_fraction: float = Field(0.0, ge=0, lt=1, description="fraction of keys in the test split")


class PrepareConfig(Section):
    """Photos to shards: ``dinogen prepare`` and its three steps."""

    faces: FacesConfig = FacesConfig()
    pyramids: PyramidsConfig = PyramidsConfig()
    latents: LatentsConfig | None = None
    pack: PackConfig = PackConfig()


log = logging.getLogger(__name__)
# Moved runs that this process has logged already.
_logged: set[Path] = set()
_GUIDE_NAME = re.compile(r"[a-z][a-z0-9_]*")


class GuideConfig(Section):
    """The frozen feature network."""

    name: str = Field(
        "dinov2",
        description="which network, see docs/guided.md; onet: the face detector's last network, "
        "whose weights are installed with dinogen; pixels: the RGB values themselves, without a "
        "network",
        json_schema_extra=lambda schema: schema.update(enum=list(known_guides())),
    )
    file: str | None = Field(
        None, description="your own Python file that defines the guide, which is named after it"
    )
    path: str = Field(
        "facebook/dinov2-small",
        description="hub name, hf://user/name[@revision][/path], local checkpoint folder or "
        "weights file; each guide has a default of its own",
    )
    revision: str | None = Field(None, description="hub revision (commit, tag or branch)")
    layer: int | str | tuple[int, ...] | tuple[str, ...] = Field(
        -1,
        description="which layer, or a list of layers concatenated along the channels; -1 is the "
        "last; block numbers of transformers, for inception pool1, pool2, mixed_5d, mixed_6e, for "
        "onet conv1, conv2, conv3, pool3, conv4",
    )

    @model_validator(mode="before")
    @classmethod
    def _named(cls, values: Any) -> Any:
        """The name of its file, and the default path of its own."""
        if not isinstance(values, dict):
            return values
        name, file = values.get("name", "dinov2"), values.get("file")
        if isinstance(file, str):
            name = Path(file).stem
            if values.get("name", name) != name:
                raise ValueError(
                    f"name {values['name']} and file {file} contradict each other: leave out name"
                )
            values = {**values, "name": name}
        elif isinstance(name, str) and name not in known_guides():
            names = ", ".join(repr(guide) for guide in known_guides())
            raise ValueError(f"name: there is no guide {name!r}: use {names}, or file: guide.py")
        own = default_path(str(name), file if isinstance(file, str) else None)
        return values if own is None else {"path": own, **values}

    @field_validator("layer", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        several = list(value) if isinstance(value, (list, tuple)) else [value]
        kinds = {type(one) for one in several}
        if kinds not in ({int}, {str}):
            raise ValueError(f"{value!r}: give a number, a name, or a list of either")
        if len(set(several)) < len(several):
            raise ValueError(f"{value!r}: name each layer once")
        return value


# Options of families that say where a frozen network is, and not what is computed.
FAMILY_PLACES = {"latent": {"path", "revision"}}


class FamilyConfig(BaseModel):
    """Which family; every other key belongs to the family's own Options."""

    model_config = ConfigDict(extra="allow")

    name: str = Field(
        "guided", description="a file of dinogen/families, or an entry point of dinogen.families"
    )
    file: str | None = Field(
        None, description="your own Python file that defines the family, which is named after it"
    )

    @model_validator(mode="after")
    def _named_after_its_file(self) -> FamilyConfig:
        if self.file is not None:
            stem = Path(self.file).stem
            if "name" in self.model_fields_set and self.name != stem:
                raise ValueError(
                    f"name {self.name} and file {self.file} contradict each other: leave out name"
                )
            self.name = stem
        return self

    @property
    def options(self) -> dict[str, Any]:
        """The family's own keys, unchecked."""
        return dict(self.model_extra or {})


def family_places(then: Mapping[str, Any], today: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a family that was trained before, with :data:`FAMILY_PLACES` as they are today.

    Args:
        then: its options, in a checkpoint.
        today: in the config of the run.

    Returns:
        The options that hold such places; none for most families.
    """
    found = {}
    for name, keys in FAMILY_PLACES.items():
        mine, its = then.get(name), today.get(name)
        if isinstance(mine, Mapping) and isinstance(its, Mapping):
            found[name] = {**mine, **{key: its[key] for key in keys if key in its}}
    return found


class NotesConfig(Section):
    """What a run is for and what came of it, in your own words; nothing is computed from it."""

    # step: 2 is a number in YAML
    model_config = ConfigDict(extra="forbid", validate_default=True, coerce_numbers_to_str=True)

    step: str | None = Field(None, description="position in the history of the family, such as 2b")
    change: str | None = Field(None, description="what differs from the step before")
    failed: str | None = Field(None, description="what did not work")
    next: str | None = Field(None, description="what to try next")


class Config(Section):
    """A whole run, from photos to generated images."""

    run: Path = Field(Path("runs/run"), description="folder of the run")
    seed: int = Field(0, ge=0, lt=2**63, description="seed of all random numbers")
    device: Literal["auto", "cuda", "mps", "cpu"] = Field(
        "auto", description="auto: a CUDA GPU, else Apple's, else the CPU"
    )
    prepare: PrepareConfig = PrepareConfig()
    guide: GuideConfig = GuideConfig()
    guides: dict[str, GuideConfig] = Field(
        {}, description="further guides by a name of your choice: level p8 of NAME is NAME.p8"
    )
    clip: ClipConfig | None = None
    data: DataConfig = DataConfig()
    family: FamilyConfig = FamilyConfig()
    stages: tuple[StageConfig, ...] = Field(
        (StageConfig(resolution=4, kimg=50),), min_length=1, description="trained in this order"
    )
    init_from: str | None = Field(
        None,
        description="a run's folder, an exported file or hf://user/name: matching weights of its "
        "networks are loaded when a new run starts",
    )
    freeze: dict[str, Annotated[int, Field(ge=0)]] = Field(
        {},
        description="number of a network's layers, counted from the image, that keep the weights "
        "of init_from, by its name: {D: 10} (Freeze-D)",
    )
    augment: AugmentConfig = AugmentConfig()
    optim: OptimConfig = OptimConfig()
    engine: EngineConfig = EngineConfig()
    ema: EmaConfig = EmaConfig()
    eval: EvalConfig = EvalConfig()
    metrics: MetricsConfig = MetricsConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    logging: Sinks = Field(
        ("tensorboard",),
        description="where curves and samples are shown: tensorboard, csv, wandb, mlflow, trackio; "
        "each by its name, or with options, as {wandb: {project: faces}}; docs/logging.md",
    )
    cluster: ClusterConfig = ClusterConfig()
    notes: NotesConfig = NotesConfig()

    @field_validator("guides")
    @classmethod
    def _named(cls, guides: dict[str, GuideConfig]) -> dict[str, GuideConfig]:
        for name in guides:
            if not _GUIDE_NAME.fullmatch(name) or name in ("clip", "latents", "main", "text"):
                raise ValueError(
                    f"'{name}' cannot be the name of a guide: use lower-case letters, digits and "
                    "_, a letter first, and not clip, latents, main (that is guide:) or text"
                )
            if name == "flipped" or name.endswith("_flipped"):
                raise ValueError(
                    f"'{name}' cannot be the name of a guide: features of mirrored images are "
                    "stored under it (prepare.pyramids.flips): choose another name"
                )
        return guides

    @model_validator(mode="after")
    def _stages_grow(self) -> Config:
        sizes = [stage.resolution for stage in self.stages]
        if any(b != 2 * a for a, b in itertools.pairwise(sizes)):
            raise ValueError(
                f"stages {sizes}: each stage must have twice the resolution of the one before it"
            )
        if self.stages[0].fade_kimg:
            raise ValueError(
                f"stages.0: fade_kimg is {self.stages[0].fade_kimg}, but the first stage has no "
                "stage before it to fade in from: leave it out"
            )
        return self

    @model_validator(mode="after")
    def _frozen_were_trained(self) -> Config:
        if not any(self.freeze.values()):
            return self
        if self.init_from is None:
            raise ValueError(
                "freeze: without init_from the frozen layers would never be trained: give both, "
                "or leave it out"
            )
        if len(self.stages) > 1:
            raise ValueError(
                "freeze: a stage that grows has new layers at the image, which have to train: give "
                "one stage, or leave it out"
            )
        return self

    @property
    def sinks(self) -> dict[str, dict[str, Any]]:
        """The options of what ``logging`` names, by name, in its order."""
        found: dict[str, dict[str, Any]] = {}
        for item in self.logging:
            found |= {item: {}} if isinstance(item, str) else item
        return found


def load_config(path: Path | str, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Read a YAML file, apply ``key=value`` overrides, and check the result.

    A ``config.yaml`` beside the stages of a run means that run, wherever it was copied or moved
    to; an override of ``run`` names another one.

    Args:
        path: YAML file, or the name of a shipped config, such as ``guided_64``.
        overrides: ``a.b=value`` items; the value is parsed as YAML, list items are addressed by
            their number (``stages.0.kimg=2``).

    Raises:
        ConfigError: naming the file and key, with the nearest valid name or the remedy.
    """
    path = find_config(Path(path))
    data = read_mapping(path)
    if _of_a_run(path):
        data = with_earlier_defaults(data)
    config = parse_config(data, overrides, source=str(path))
    config = config.model_copy(update={"run": named_folder(config.run)})
    if any(item.partition("=")[0].strip() == "run" for item in overrides) or not _of_a_run(path):
        return config
    here = named_folder(path.parent)
    if config.run.resolve() == here.resolve():
        return config
    if here not in _logged:
        _logged.add(here)
        log.info("%s is in the folder of a run: it means this run, not %s", path, config.run)
    return config.model_copy(update={"run": here})


def _of_a_run(path: Path) -> bool:
    """Whether a file is the config in the folder of a run whose first stage has begun.

    A folder that is only named like a stage does not count: it may hold photos shrunk to 64x64.
    """
    try:
        return path.name == CONFIG and has_stages(path.parent)
    except OSError:  # a folder that may be entered, but not listed
        return False


def with_earlier_defaults(data: dict[str, Any]) -> dict[str, Any]:
    """The config of a run that has begun, where it leaves out a key whose default has changed.

    Family ``guided`` without objectives was ``mse`` before ``drift`` became the default.

    Args:
        data: as it was stored with the run or a checkpoint; not changed.
    """
    family = data.get("family") or {}
    if not isinstance(family, dict) or family.get("file") is not None:
        return data
    spelled = "objectives" in family or "objective" in family
    if family.get("name", FamilyConfig().name) != "guided" or spelled:
        return data
    return data | {"family": family | {"objectives": [{"name": "mse"}]}}


def parse_config(
    data: dict[str, Any], overrides: list[str] | tuple[str, ...] = (), source: str = "config"
) -> Config:
    """Check a mapping as :func:`load_config` does; ``source`` is named in errors.

    Raises:
        ConfigError: naming the key, with the nearest valid name or the remedy.
    """
    if overrides:
        defaults = Config().model_dump(mode="json")
        for item in overrides:
            override(data, item, defaults)
    try:
        return Config.model_validate(data)
    except ValidationError as error:
        raise ConfigError(describe_errors(error, Config, source)) from None


def dump_config(config: Config) -> str:
    """The whole resolved config as YAML; reading it gives the same config again."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def find_stage(config: Config, resolution: int) -> int:
    """Index of the stage of this resolution.

    Raises:
        ConfigError: the config has no such stage.
    """
    sizes = [stage.resolution for stage in config.stages]
    if resolution not in sizes:
        raise ConfigError(f"stage {resolution} is not in the config: stages are {sizes}")
    return sizes.index(resolution)


def with_lengths(config: Config, num_samples: int) -> Config:
    """The config with each length that is given in epochs written out in thousands of images.

    Args:
        config: the whole run.
        num_samples: of an epoch of the data it is trained on.

    Raises:
        ConfigError: there is no such data, or a fade-in is longer than its stage.
    """
    lengths = [stage.epochs for stage in config.stages if stage.kimg is None]
    measure = config.eval
    if measure.every_kimg is None:
        lengths.append(measure.every_epochs)
    if not any(lengths):
        return config
    if not num_samples:
        raise ConfigError(
            f"data.split: {config.data.location} has no samples in split {config.data.split}: "
            "name another one"
        )
    data = config.model_dump(mode="json")
    for section, kimg, epochs in [
        *((stage, "kimg", "epochs") for stage in data["stages"]),
        (data["eval"], "every_kimg", "every_epochs"),
    ]:
        if section[kimg] is None and section[epochs] is not None:
            section[kimg] = section[epochs] * num_samples / 1000
    return parse_config(data)
