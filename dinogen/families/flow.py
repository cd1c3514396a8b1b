"""Family `flow`: rectified flow, a straight path from noise to images; with classes or without."""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from dinogen.diffusion.flow import logit_normal, target, velocity, walk_times
from dinogen.diffusion.ode import Derivative, integrate, integrate_back
from dinogen.diffusion.process import q_sample
from dinogen.distributed import rng
from dinogen.families.denoiser import Denoiser, DenoiserOptions, Noised, Predict
from dinogen.transfer import to_device_together

# Of times in [0, 1], before the network embeds them: as fine as the time steps of `ddpm`.
TIME_SCALE = 1000.0


class Flow(Denoiser):
    """Liu et al. 2023, "Flow Straight and Fast: Learning to Generate and Transfer Data with
    Rectified Flow": a network learns the velocity of straight lines from images to noise; sampling
    follows it backwards, in few steps.

    The loss is the mean squared error of what is predicted (their equation 1 for v), at times
    that are drawn as in Esser et al. 2024, "Scaling Rectified Flow Transformers".
    """

    class Options(DenoiserOptions):
        """Keys of ``family:`` for ``name: flow``."""

        prediction: Literal["v", "x0", "epsilon"] = Field(
            "v", description="what the network predicts: the velocity, the image, or the noise"
        )
        times: Literal["uniform", "logit_normal"] = Field(
            "logit_normal", description="how training draws times; logit_normal favours the middle"
        )
        times_mean: float = Field(
            0.0, description="of logit_normal, before the sigmoid; above 0: more noise"
        )
        times_std: float = Field(1.0, gt=0, description="of logit_normal, before the sigmoid")
        sampler: Literal["euler", "heun", "midpoint"] = Field(
            "midpoint", description="midpoint and heun call the network twice a step, and err less"
        )
        sample_steps: int = Field(25, ge=1, description="steps from noise to an image")

        @model_validator(mode="after")
        def _check(self) -> Flow.Options:
            for name in ("times_mean", "times_std"):
                value, default = getattr(self, name), type(self).model_fields[name].default
                if self.times == "uniform" and value != default:
                    raise ValueError(f"{name} {value} is of logit_normal times: leave it out")
            return self

    options: Options

    @property
    def inverts_by(self) -> str:
        """The sampler from the image to noise."""
        return f"{self.options.sampler} run backwards in {self.options.sample_steps} steps"

    def _noised(self, x0: Tensor, position: Tensor, kind: str) -> Noised:
        own, seed = self.options, self.config.seed
        if own.times == "uniform":
            drawn = rng.uniform(seed, f"t{kind}", position)
        else:
            normal = rng.normal(seed, f"t{kind}", position, ())
            drawn = logit_normal(normal, own.times_mean, own.times_std)
        eps = rng.normal(seed, f"eps{kind}", position, tuple(x0.shape[1:]), device=x0.device)
        (t,) = to_device_together([drawn], self.device)
        noise = t.reshape(-1, *[1] * (x0.dim() - 1))
        wanted = target(own.prediction, x0, eps)
        return Noised(q_sample(x0, eps, 1 - noise, noise), TIME_SCALE * t, wanted)

    def _integrate(self, predict: Predict, latents: Tensor, indices: Tensor, seed: int) -> Tensor:
        times = walk_times(self.options.sample_steps)
        return integrate(self._velocity(predict), latents, times, self.options.sampler)

    def _invert(self, predict: Predict, x: Tensor) -> Tensor:
        times = walk_times(self.options.sample_steps)
        return integrate_back(self._velocity(predict), x, times, self.options.sampler)

    def _velocity(self, predict: Predict) -> Derivative:
        def of(x: Tensor, time: float) -> Tensor:
            t = torch.full((len(x),), TIME_SCALE * time, device=x.device)
            output = predict(x, t, 1 - time)
            return velocity(self.options.prediction, output, x, time, clip=self._bounded)

        return of

    def _visited(self) -> tuple[Tensor, dict[str, Any]]:
        times = walk_times(self.options.sample_steps)
        facts = {"times": times, "time_scale": TIME_SCALE, "sampler": self.options.sampler}
        return TIME_SCALE * torch.tensor(times[:-1]), facts
