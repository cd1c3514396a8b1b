"""Family `ddpm`: diffusion whose network predicts eps, v or x0; with classes or without."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from dinogen.config import Config, StageConfig
from dinogen.diffusion.process import Schedule, invert, q_sample, sample, target, time_steps
from dinogen.distributed import rng
from dinogen.errors import UserError
from dinogen.families.denoiser import Denoiser, DenoiserOptions, Noised, Predict
from dinogen.transfer import to_device_together


class Ddpm(Denoiser):
    """Ho et al. 2020, "Denoising Diffusion Probabilistic Models": a network learns to take noise
    out of images, at every strength of noise; sampling starts from noise alone.

    The loss is the plain mean squared error of what is predicted (equation 14 for epsilon).
    """

    class Options(DenoiserOptions):
        """Keys of ``family:`` for ``name: ddpm``."""

        schedule: Literal["linear", "cosine"] = Field(
            "cosine", description="how noise grows with the time step"
        )
        prediction: Literal["epsilon", "v", "x0"] = Field(
            "v", description="what the network predicts: the noise, v, or the image"
        )
        num_steps: int = Field(1000, ge=2, description="time steps of the schedule")
        sampler: Literal["ddim", "ddpm"] = Field(
            "ddim", description="ddim adds no noise on the way; ddpm is ancestral"
        )

        @model_validator(mode="after")
        def _check(self) -> Ddpm.Options:
            if self.sample_steps > self.num_steps:
                raise ValueError(
                    f"sample_steps {self.sample_steps} are more than num_steps {self.num_steps}: "
                    "sample in fewer"
                )
            return self

    options: Options

    def __init__(self, config: Config, stage: StageConfig, device: torch.device) -> None:
        super().__init__(config, stage, device)
        self.schedule = Schedule(self.options.schedule, self.options.num_steps)

    @property
    def inverts_by(self) -> str:
        """DDIM from the image to noise."""
        return f"DDIM run backwards in {self.options.sample_steps} steps"

    def _predict(self, predict: Predict) -> Callable[[Tensor, Tensor], Tensor]:
        """A :data:`Predict` by time steps (B,) on the CPU, all of them the same."""

        def of_step(x: Tensor, t: Tensor) -> Tensor:
            share = 1 - (int(t[0]) + 1) / self.schedule.num_steps
            return predict(x, t.to(self.device), share)

        return of_step

    def _noised(self, x0: Tensor, position: Tensor, kind: str) -> Noised:
        """At one time step drawn per sample."""
        seed = self.config.seed
        drawn = rng.integers(seed, f"t{kind}", position, high=self.schedule.num_steps)
        eps = rng.normal(seed, f"eps{kind}", position, tuple(x0.shape[1:]), device=x0.device)
        small = [drawn, *self.schedule.signal_noise(drawn, x0)]
        t, signal, noise = to_device_together(small, self.device)
        wanted = target(self.options.prediction, x0, eps, signal, noise)
        return Noised(q_sample(x0, eps, signal, noise), t, wanted)

    def _integrate(self, predict: Predict, latents: Tensor, indices: Tensor, seed: int) -> Tensor:
        def noise(t: int) -> Tensor:
            return rng.normal(seed, f"sample/{t}", indices, self._shape, device=self.device)

        return sample(
            self._predict(predict),
            self.schedule,
            self.options.prediction,
            latents,
            self.options.sample_steps,
            eta={"ddim": 0.0, "ddpm": 1.0}[self.options.sampler],
            noise=noise,
            clip=self._bounded,
        )

    def _invert(self, predict: Predict, x: Tensor) -> Tensor:
        if self.options.sampler != "ddim":
            raise UserError(
                "family.sampler: ddpm adds noise on the way, so an image has no one latent: sample "
                "with ddim"
            )
        steps, kind = self.options.sample_steps, self.options.prediction
        return invert(self._predict(predict), self.schedule, kind, x, steps, clip=self._bounded)

    def _visited(self) -> tuple[Tensor, dict[str, Any]]:
        visited = time_steps(self.schedule.num_steps, self.options.sample_steps)
        alpha_bar = [float(self.schedule.alpha_bar[t]) for t in visited]
        return torch.tensor(visited), {"time_steps": visited, "alpha_bar": alpha_bar}
