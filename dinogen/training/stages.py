"""The plan of one stage: when it ends, how far it is faded in, and how it grows from the last."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from dinogen.config import Config, ConfigError, StageConfig, parse_config


@dataclass(frozen=True)
class StagePlan:
    """A stage on the clock of the run.

    Attributes:
        stage: its config.
        start: nimg at which it begins, where the stage before ended.
    """

    stage: StageConfig
    start: int

    @property
    def end(self) -> int:
        """nimg from which on it is done."""
        return self.start + self.stage.num_images

    @property
    def fade_end(self) -> int:
        """nimg from which on everything trains."""
        return self.start + round(self.stage.fade_kimg * 1000)

    def fading(self, nimg: int) -> bool:
        """Whether only the new block trains."""
        return nimg < self.fade_end

    def alpha(self, nimg: int) -> float:
        """Share of the new block in the image, 0 to 1."""
        return (nimg - self.start) / (self.fade_end - self.start) if self.fading(nimg) else 1.0

    def lr_factor(self, nimg: int) -> float:
        """Share of the learning rate that the step which begins at ``nimg`` takes.

        Linear at both ends: the first step of a warm-up takes a batch's share of it, and the last
        of a decay too.
        """
        warmup, decay = self.stage.warmup_kimg * 1000, self.stage.decay_kimg * 1000
        rise = (nimg - self.start + self.stage.batch) / warmup if warmup else 1.0
        fall = (self.end - nimg) / decay if decay else 1.0
        return min(1.0, rise, fall)


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


def find_stage(config: Config, resolution: int) -> int:
    """Index of the stage of this resolution.

    Raises:
        ConfigError: the config has no such stage.
    """
    sizes = [stage.resolution for stage in config.stages]
    if resolution not in sizes:
        raise ConfigError(f"stage {resolution} is not in the config: stages are {sizes}")
    return sizes.index(resolution)


def due(before: int, now: int, every_kimg: float) -> bool:
    """Whether a multiple of ``every_kimg`` thousand images lies in (before, now]."""
    every = every_kimg * 1000
    return int(now // every) > int(before // every)


def grow(
    network: nn.Module,
    state: dict[str, Tensor],
    new: set[str],
    fail: Callable[[str], Exception],
) -> None:
    """Load the stage before into a grown network; what is new keeps its initialisation.

    Args:
        network: the grown network, changed in place.
        state: state dict of the stage before; what the grown network dropped is ignored.
        new: names of the parameters that it did not have.
        fail: makes the error of a message.
    """
    own = network.state_dict()
    kept = {name: value for name, value in state.items() if name in own}
    missing = set(own) - set(kept) - new
    wrong = [name for name, value in kept.items() if value.shape != own[name].shape]
    if missing or wrong:
        names = ", ".join(sorted(missing | set(wrong))[:4])
        raise fail(f"the network of the stage before does not fit ({names}): same family options?")
    network.load_state_dict(kept, strict=False)
