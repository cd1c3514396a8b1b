"""What a run has learnt: its averaged networks, from a checkpoint or an exported file.

The half-life of an average is measured in images.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from dinogen.config import (
    Config,
    ConfigError,
    EmaConfig,
    StageConfig,
    StagePlan,
    family_places,
    find_stage,
)
from dinogen.distributed import process_group
from dinogen.families.abilities import Recalls, condition_for, fade
from dinogen.families.base import Condition, Family, sample_in_parts
from dinogen.families.registry import family_class
from dinogen.runs.files import state_problem
from dinogen.runs.layout import STATE, file_mark, is_exported, stage_name
from dinogen.runs.run import Run, Stage
from dinogen.training.checkpointing.checkpoint import (
    Checkpoint,
    NewestCheckpoints,
    load_checkpoint,
)
from dinogen.training.checkpointing.exported import (
    ExportedFile,
    exported_config,
    open_exported,
)
from dinogen.transfer import Buffers, copy_all


def ema_decay(batch: int, nimg: float, config: EmaConfig) -> float:
    """Decay of one step: 0.5 ** (batch / half-life), the half-life ramped up from the start.

    As in Karras et al. 2020, "Training Generative Adversarial Networks with Limited Data"
    (appendix C): the half-life is at most ``rampup`` times the images seen.

    Args:
        batch: images of the step, over all ranks.
        nimg: images seen since the average began.
    """
    halflife = config.halflife_kimg * 1000
    if config.rampup is not None:
        halflife = min(halflife, config.rampup * nimg)
    decay: float = 0.5 ** (batch / max(halflife, 1e-8))
    return decay


class Ema:
    """Averaged copies of some networks, in eval mode and without gradients."""

    def __init__(self, networks: Mapping[str, nn.Module], config: EmaConfig) -> None:
        self.config = config
        self.networks: dict[str, nn.Module] = {
            name: copy.deepcopy(network).eval().requires_grad_(False)
            for name, network in networks.items()
        }
        # Listed once: to walk through the modules again takes longer than to average them.
        self._weights: list[Tensor] = [p for net in networks.values() for p in net.parameters()]
        self._averages: list[Tensor] = [
            p for net in self.networks.values() for p in net.parameters()
        ]
        self._buffers = Buffers(networks.values())
        self._copies = Buffers(self.networks.values())

    @torch.no_grad()
    def update(self, batch: int, nimg: float) -> None:
        """Move the averages towards the weights; buffers are copied.

        Args:
            batch: images of the step, over all ranks.
            nimg: images seen since the average began, this step's included.
        """
        rate = 1 - ema_decay(batch, nimg, self.config)
        torch._foreach_lerp_(self._averages, self._weights, rate)
        self.take_buffers()

    def take_buffers(self) -> None:
        """Copy the buffers of the networks, as each update does too."""
        copy_all(self._copies.now(), self._buffers.now())


@dataclass(frozen=True)
class Snapshot:
    """Averaged networks of one checkpoint, ready to sample.

    Attributes:
        resolution: side of its images.
        nimg: images that the run had been shown.
        family: knows how to sample.
        ema: the averaged networks.
        mark: ``.random-guide`` if the guide was random, else empty; part of file names.
        alpha: how far the stage is faded in, 0 to 1.
        fading: whether it still is.
        checkpoint: what it was read from.
    """

    resolution: int
    nimg: int
    family: Family
    ema: Ema
    mark: str
    alpha: float
    fading: bool
    checkpoint: Checkpoint

    @property
    def place(self) -> Stage:
        """The stage's folder, of the run that the checkpoint was read from."""
        return Run.of(self.family.config).stage(self.resolution)

    def sample(self, num: int, seed: int, condition: Condition | None = None) -> Tensor:
        """Images 0 to ``num - 1`` under ``seed``, (N, 3, R, R) in [-1, 1] on the CPU.

        The image of a number does not depend on how many are drawn.

        Args:
            num: how many.
            seed: of the draws.
            condition: what they are drawn for, see :meth:`condition`.
        """
        return sample_in_parts(self.family, self.ema.networks, num, seed, 1, condition)

    @torch.no_grad()
    def sample_numbers(self, numbers: Tensor, seed: int, psi: float) -> Tensor:
        """Images (N, 3, R, R) in [-1, 1] on the CPU of any sample numbers (N,), truncated.

        Args:
            numbers: int64; each image depends on its number alone.
            seed: of the draws.
            psi: how far from the mean, 1 for images as :meth:`sample` draws them.
        """
        family, networks = self.family, self.ema.networks
        images = [
            family.decode(networks, family.latents(one, seed), one, seed, psi).float().cpu()
            for one in numbers.split(1)
        ]
        return torch.cat(images)

    def condition(self, texts: Sequence[str], guidance: float = 1.0) -> Condition:
        """What :meth:`sample` takes to draw what prompts describe, in turn.

        Args:
            texts: one prompt or more.
            guidance: 1 as in training, more to exaggerate, 0 for nothing.

        Raises:
            UserError: the run was not trained with text, or CLIP is another one than then.
        """
        return condition_for(self.family, texts, guidance, self.checkpoint.state["facts"])


def load_snapshot(
    run: Path,
    resolution: int | None = None,
    nimg: int | None = None,
    places: Sequence[str] = (),
) -> Snapshot:
    """A checkpoint of a run, by default the newest of the largest stage that has one; or a file.

    Every rank has to call it, and gets the same one.

    Args:
        run: folder of the run, or a file that ``dinogen export`` wrote.
        resolution: which stage.
        nimg: which checkpoint, by the images that the run had been shown.
        places: ``KEY=VALUE`` changes of where data and guides lie now.

    Raises:
        ConfigError: ``run`` is no run, there is no such checkpoint, or it is of a dinogen whose
            config this one does not know.
    """
    if is_exported(run):
        return _of_file(open_exported(run), resolution, nimg, places)
    today = run_config(run, places)
    if resolution is None:
        stages = today.stages[::-1]
    else:
        stages = (today.stages[find_stage(today, resolution)],)
    if nimg is None:
        newest = NewestCheckpoints(today.run)
        found = ((stage, newest.of(stage.resolution)) for stage in stages)
    else:
        found = ((stage, _checkpoint_at(today, stage, nimg)) for stage in stages)
    stage, checkpoint = next(((s, c) for s, c in found if c), (None, None))
    if stage is None or checkpoint is None:
        raise ConfigError(_nothing(today, stages, nimg))
    # the checkpoint's own config: the file beside the run may have been edited since; but that
    # file knows where data and guide lie now, and what they hold is compared where they are read;
    # and how a run is measured is no part of what it has learnt
    config = checkpoint.config
    now = {name: getattr(today, name) for name in ("data", "guide", "guides", "clip", "metrics")}
    now["run"] = today.run
    moved = family_places(config.family.options, today.family.options)
    now["family"] = config.family.model_copy(update=moved)
    config = config.model_copy(update=now)
    stage = config.stages[find_stage(config, stage.resolution)]
    family = family_class(config.family)(config, stage, process_group.device())
    ema = Ema({name: family.networks[name] for name in family.ema_networks}, config.ema)
    for name, network in ema.networks.items():
        network.load_state_dict(checkpoint.tensors(f"{name}.ema"))
    progress = checkpoint.state["progress"]
    plan = StagePlan(stage, checkpoint.state["start"])
    seen = progress["nimg"]
    return _snapshot(family, ema, seen, plan.alpha(seen), plan.fading(seen), checkpoint)


def _of_file(
    file: ExportedFile, resolution: int | None, nimg: int | None, places: Sequence[str]
) -> Snapshot:
    """What an exported file holds; another stage or checkpoint is not in it."""
    info = file.info
    for option, asked in {"resolution": resolution, "nimg": nimg}.items():
        if asked not in (None, info[option]):
            raise ConfigError(
                f"{file.folder}: holds one network alone, of stage {stage_name(info['resolution'])}"
                f" at {info['nimg']} images: leave out --stage and --nimg, or give the run"
            )
    config = exported_config(file, places)
    process_group.use_device(config.device)
    stage = config.stages[find_stage(config, info["resolution"])]
    family = family_class(config.family)(config, stage, process_group.device())
    if set(file.networks) != set(family.ema_networks):
        raise ConfigError(
            f"{file.folder}: holds {' and '.join(file.networks)}, but its family "
            f"{config.family.name} draws with {' and '.join(family.ema_networks)}: export the run "
            "again"
        )
    ema = Ema({name: family.networks[name] for name in file.networks}, config.ema)
    try:
        for name, network in ema.networks.items():
            network.load_state_dict(file.tensors(f"{name}.ema"))
    except RuntimeError as error:
        raise ConfigError(
            f"{file.folder}: its tensors do not fit the network it names: {error}"
        ) from None
    return _snapshot(family, ema, info["nimg"], info["alpha"], info["fading"], file)


def _snapshot(
    family: Family, ema: Ema, nimg: int, alpha: float, fading: bool, checkpoint: Checkpoint
) -> Snapshot:
    fade(family, ema.networks, alpha, fading)
    facts = checkpoint.state["facts"]
    if isinstance(family, Recalls):
        is_file = isinstance(checkpoint, ExportedFile)
        family.recall(facts, checkpoint.folder.parent if is_file else family.config.run)
    mark = file_mark(facts)
    size = family.stage.resolution
    return Snapshot(size, nimg, family, ema, mark, alpha, fading, checkpoint)


def run_config(run: Path, places: Sequence[str] = ()) -> Config:
    """The config of a run; chooses its device, so it comes before ranks join each other.

    Args:
        run: folder of the run, or an exported file.
        places: ``KEY=VALUE`` changes of where data and guides lie now.

    Raises:
        ConfigError: ``run`` is no run, and no exported file.
        DistError: this machine does not have the device.
    """
    exported = is_exported(run)
    config = exported_config(open_exported(run), places) if exported else Run(run, places).config
    process_group.use_device(config.device)
    return config


def _checkpoint_at(config: Config, stage: StageConfig, nimg: int) -> Checkpoint | None:
    """The stage's checkpoint at ``nimg``, None if there is none.

    Raises:
        ConfigError: it is broken.
    """
    folder = Run.of(config).stage(stage.resolution).checkpoints.at(nimg)
    if not folder.is_dir():
        return None
    try:
        found = load_checkpoint(folder)
        if problem := state_problem(found.state):
            raise ValueError(f"{folder}: {STATE} cannot be used: {problem}")
        return found
    except ValueError as error:
        raise ConfigError(f"{error}: take another checkpoint") from None


def _nothing(config: Config, stages: Sequence[StageConfig], nimg: int | None) -> str:
    """What to say when no checkpoint fits."""
    names = " or ".join(stage_name(stage.resolution) for stage in stages)
    lists = []
    for stage in reversed(stages):
        place = Run.of(config).stage(stage.resolution)
        if kept := place.checkpoints.nimg:
            lists.append(f"{place.name}: {', '.join(map(str, kept))}")
    if nimg is None or not lists:
        return f"{config.run}: no complete checkpoint of stage {names}: train it first"
    return f"{config.run}: no checkpoint at {nimg} images; there are {'; '.join(lists)}"
