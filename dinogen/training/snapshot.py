"""Reads what a run has learnt, to make pictures from it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from dinogen import dist
from dinogen.config import Config, ConfigError, load_config
from dinogen.families.base import Family, family_class
from dinogen.training.checkpoint import newest_checkpoint, stage_folder
from dinogen.training.ema import Ema
from dinogen.training.stages import StagePlan, find_stage
from dinogen.training.state import file_mark, sample_in_parts


@dataclass(frozen=True)
class Snapshot:
    """Averaged networks of one stage, ready to sample.

    Attributes:
        resolution: side of its pictures.
        nimg: images that the run had been shown.
        family: knows how to sample.
        ema: the averaged networks.
        mark: ``.random-guide`` if the guide was random, else empty; part of file names.
    """

    resolution: int
    nimg: int
    family: Family
    ema: Ema
    mark: str

    def sample(self, num: int, seed: int) -> Tensor:
        """Pictures 0 to ``num - 1`` under ``seed``, (N, 3, R, R) in [-1, 1] on the CPU.

        The picture of a number does not depend on how many are asked for.
        """
        return sample_in_parts(self.family, self.ema.networks, num, seed, part=1)


def load_snapshot(run: Path, resolution: int | None = None) -> Snapshot:
    """The newest checkpoint of a stage; by default of the largest stage that has one.

    Args:
        run: folder of the run.
        resolution: which stage.

    Raises:
        ConfigError: ``run`` is no run, or the stage has no checkpoint.
    """
    if not (run / "config.yaml").is_file():
        raise ConfigError(f"{run}: no run here (config.yaml is missing): give the folder of a run")
    config = load_config(run / "config.yaml").model_copy(update={"run": run})
    if resolution is None:
        stages = config.stages[::-1]
    else:
        stages = (config.stages[find_stage(config, resolution)],)
    for stage in stages:
        checkpoint = newest_checkpoint(stage_folder(config, stage) / "checkpoints")
        if checkpoint is not None:
            break
    else:
        names = " or ".join(f"{s.resolution}x{s.resolution}" for s in stages)
        raise ConfigError(f"{run}: no complete checkpoint of stage {names}: train it first")
    device = dist.device()
    # the checkpoint's own config: the file beside the run may have been edited since
    config = Config.model_validate(checkpoint.state["config"])
    stage = config.stages[find_stage(config, stage.resolution)]
    family = family_class(config.family.name)(config, stage, device)
    ema = Ema({name: family.networks[name] for name in family.ema_networks}, config.ema)
    for name, network in ema.networks.items():
        network.load_state_dict(checkpoint.tensors(f"{name}.ema"))
    nimg = checkpoint.state["progress"]["nimg"]
    plan = StagePlan(stage, checkpoint.state["start"])
    family.set_fade(ema.networks, plan.alpha(nimg), plan.fading(nimg))
    return Snapshot(stage.resolution, nimg, family, ema, file_mark(checkpoint.state["facts"]))
