"""Family `ddpm`: diffusion whose network predicts eps, v, x0 or, preconditioned, EDM's F."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from dinogen.config import Config, Section, StageConfig
from dinogen.diffusion.edm import drawn_sigma, factors, share_done, walk_sigmas
from dinogen.diffusion.edm import target as edm_target
from dinogen.diffusion.ode import Derivative, integrate, integrate_back
from dinogen.diffusion.process import (
    Prediction,
    Schedule,
    invert,
    min_snr_weight,
    q_sample,
    sample,
    target,
    time_steps,
)
from dinogen.distributed import rng
from dinogen.errors import UserError
from dinogen.families.denoiser import Denoiser, DenoiserOptions, Noised, Predict
from dinogen.transfer import to_device_together

# Network calls are 79: what Karras et al. 2022 take for ImageNet at 64x64 (table 3)
EDM_STEPS = 40
SIGMA_OF_IMAGES, SIGMA_OF_LATENTS = 0.5, 1.0


class EdmOptions(Section):
    """Noise of prediction: edm; the defaults are those of Karras et al. 2022 (table 1)."""

    sigma_data: float | None = Field(
        None,
        gt=0,
        description="standard deviation of what gets noise; default: 0.5 for images, whose values "
        "are in [-1, 1], and 1 for latents, which are normalised",
    )
    sigma_min: float = Field(0.002, gt=0, description="least noise that sampling visits")
    sigma_max: float = Field(80.0, gt=0, description="noise that sampling starts from")
    rho: float = Field(7.0, gt=0, description="larger: more steps where there is little noise")
    mean: float = Field(-1.2, description="of the logarithm of sigma in training")
    std: float = Field(1.2, gt=0, description="of the logarithm of sigma in training")

    @model_validator(mode="after")
    def _check(self) -> EdmOptions:
        if self.sigma_min >= self.sigma_max:
            raise ValueError(
                f"sigma_min {self.sigma_min} has to be less than sigma_max {self.sigma_max}"
            )
        return self

    @property
    def walk(self) -> tuple[float, float, float]:
        """Arguments of :func:`dinogen.diffusion.edm.walk_sigmas` after the number of steps."""
        return self.sigma_min, self.sigma_max, self.rho


class Ddpm(Denoiser):
    """Ho et al. 2020, "Denoising Diffusion Probabilistic Models": a network learns to take noise
    out of images, at every strength of noise; sampling starts from noise alone.

    The loss is the plain mean squared error of what is predicted (equation 14 for epsilon).
    ``min_snr`` weighs it by the signal-to-noise ratio (Hang et al. 2023, "Efficient Diffusion
    Training via Min-SNR Weighting Strategy"). ``prediction: edm`` is the parametrisation of Karras
    et al. 2022, with noise, loss and sampler of its own, see :mod:`dinogen.diffusion.edm`.
    """

    class Options(DenoiserOptions):
        """Keys of ``family:`` for ``name: ddpm``."""

        schedule: Literal["linear", "cosine"] = Field(
            "cosine", description="how noise grows with the time step; not of edm"
        )
        prediction: Literal["epsilon", "v", "x0", "edm"] = Field(
            "v",
            description="what the network predicts: the noise, v, the image, or edm: a mixture of "
            "image and noise of unit variance, at noise of any strength",
        )
        edm: EdmOptions | None = Field(
            None, description="noise of prediction: edm; default: that of Karras et al."
        )
        num_steps: int = Field(1000, ge=2, description="time steps of the schedule; not of edm")
        min_snr: float | None = Field(
            None,
            gt=0,
            description="gamma of the loss weight min(SNR, gamma) of predicted images, which keeps "
            "small noise from dominating; Hang et al. take 5; default: no weight",
        )
        sampler: Literal["ddim", "ddpm", "heun", "euler"] = Field(
            "ddim",
            description="ddim adds no noise on the way; ddpm is ancestral; of edm: heun, its "
            "default, calls the network twice a step and errs less than euler",
        )
        sample_steps: int = Field(
            100, ge=1, description="time steps that sampling visits; default with edm: 40"
        )

        @model_validator(mode="after")
        def _check(self) -> Ddpm.Options:
            if self.prediction == "edm":
                return self._checked_edm()
            if self.edm is not None:
                raise ValueError("edm: belongs to prediction: edm: set it, or leave edm: out")
            if self.sampler not in ("ddim", "ddpm"):
                raise ValueError(
                    f"sampler {self.sampler} belongs to prediction: edm: take ddim or ddpm"
                )
            if self.sample_steps > self.num_steps:
                raise ValueError(
                    f"sample_steps {self.sample_steps} are more than num_steps {self.num_steps}: "
                    "sample in fewer"
                )
            unbounded = self.prediction == "epsilon" and self.schedule == "cosine"
            if unbounded and self.latent is not None:
                # its last signal is 5e-5, and latents have no bound to keep predicted ones in
                raise ValueError(
                    "prediction epsilon on latents with schedule cosine: hardly any signal is left "
                    "in its last step, so a small error of the noise is a huge one of the latent: "
                    "set prediction: v, or schedule: linear"
                )
            return self

        def _checked_edm(self) -> Ddpm.Options:
            given = self.model_fields_set
            if self.min_snr is not None:
                raise ValueError(
                    "min_snr: prediction edm has a loss weight of its own: leave it out"
                )
            for name in ("schedule", "num_steps"):
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(
                        f"{name}: prediction edm has no time steps: leave it out; its noise is set "
                        "in edm:"
                    )
            if "sampler" in given and self.sampler not in ("heun", "euler"):
                raise ValueError(
                    f"sampler {self.sampler} walks through time steps, and prediction edm has "
                    "none: take heun or euler"
                )
            if "sampler" not in given:
                self.sampler = "heun"
            if "sample_steps" not in given:
                self.sample_steps = EDM_STEPS
            return self

    options: Options

    def __init__(self, config: Config, stage: StageConfig, device: torch.device) -> None:
        super().__init__(config, stage, device)
        self.schedule = Schedule(self.options.schedule, self.options.num_steps)
        own = self.options
        self.edm = (own.edm or EdmOptions()) if own.prediction == "edm" else None

    @property
    def _sigma_data(self) -> float:
        """Standard deviation of what gets noise in ``edm``."""
        given = None if self.edm is None else self.edm.sigma_data
        return given or (SIGMA_OF_IMAGES if self.latent is None else SIGMA_OF_LATENTS)

    @property
    def without_noise(self) -> dict[str, Any]:
        """DDIM in place of DDPM; the samplers of EDM add none."""
        return {"sampler": "ddim"} if self.edm is None else {}

    @property
    def inverts_by(self) -> str:
        """The sampler from the image to noise."""
        name = "DDIM" if self.edm is None else self.options.sampler
        return f"{name} run backwards in {self.options.sample_steps} steps"

    @property
    def _prediction(self) -> Prediction:
        """What is predicted at the time steps of a schedule."""
        assert self.options.prediction != "edm"
        return self.options.prediction

    def _predict(self, predict: Predict) -> Callable[[Tensor, Tensor], Tensor]:
        """A :data:`Predict` by time steps (B,) on the CPU, all of them the same."""

        def of_step(x: Tensor, t: Tensor) -> Tensor:
            share = 1 - (int(t[0]) + 1) / self.schedule.num_steps
            return predict(x, t.to(self.device), share)

        return of_step

    def _noised(self, x0: Tensor, position: Tensor, kind: str) -> Noised:
        """At one time step, or sigma, drawn per sample."""
        seed = self.config.seed
        if self.edm is not None:
            return self._noised_edm(self.edm, x0, position, kind)
        drawn = rng.integers(seed, f"t{kind}", position, high=self.schedule.num_steps)
        eps = rng.normal(seed, f"eps{kind}", position, tuple(x0.shape[1:]), device=x0.device)
        small = [drawn, *self.schedule.signal_noise(drawn, x0)]
        prediction, gamma = self._prediction, self.options.min_snr
        if gamma is not None:
            weights = min_snr_weight(prediction, self.schedule.snr[drawn], gamma)
            small.append(weights.to(x0.dtype))
        t, signal, noise, *weight = to_device_together(small, self.device)
        wanted = target(prediction, x0, eps, signal, noise)
        return Noised(q_sample(x0, eps, signal, noise), t, wanted, *weight)

    def _noised_edm(self, edm: EdmOptions, x0: Tensor, position: Tensor, kind: str) -> Noised:
        seed = self.config.seed
        sigma = drawn_sigma(rng.normal(seed, f"t{kind}", position, ()), edm.mean, edm.std)
        eps = rng.normal(seed, f"eps{kind}", position, tuple(x0.shape[1:]), device=x0.device)
        c_in, c_noise, c_skip, c_out = factors(sigma, self._sigma_data)
        wide = [one.reshape(-1, *[1] * (x0.dim() - 1)) for one in (sigma, c_in, c_skip, c_out)]
        t, sigma, c_in, c_skip, c_out = to_device_together([c_noise, *wide], self.device)
        x = x0 + sigma * eps
        return Noised(c_in * x, t, edm_target(x0, x, c_skip, c_out))

    def _integrate(self, predict: Predict, latents: Tensor, indices: Tensor, seed: int) -> Tensor:
        own = self.options
        if self.edm is not None:
            assert own.sampler in ("heun", "euler")
            sigmas = walk_sigmas(own.sample_steps, *self.edm.walk)
            derivative = self._derivative(self.edm, predict)
            return integrate(derivative, sigmas[0] * latents, sigmas, own.sampler)

        def noise(t: int) -> Tensor:
            return rng.normal(seed, f"sample/{t}", indices, self._shape, device=self.device)

        return sample(
            self._predict(predict),
            self.schedule,
            self._prediction,
            latents,
            own.sample_steps,
            eta={"ddim": 0.0, "ddpm": 1.0}[own.sampler],
            noise=noise,
            clip=self._bounded,
        )

    def _derivative(self, edm: EdmOptions, predict: Predict) -> Derivative:
        """dx/dsigma."""

        def of(x: Tensor, time: float) -> Tensor:
            sigma = torch.full((len(x), *[1] * (x.dim() - 1)), time, device=x.device)
            c_in, c_noise, c_skip, c_out = factors(sigma, self._sigma_data)
            share = share_done(time, *edm.walk)
            said = predict(c_in * x, c_noise.flatten(), share)
            return (x - (c_skip * x + c_out * said)) / sigma

        return of

    def _invert(self, predict: Predict, x: Tensor) -> Tensor:
        own = self.options
        if self.edm is not None:
            assert own.sampler in ("heun", "euler")
            sigmas = walk_sigmas(own.sample_steps, *self.edm.walk)
            derivative = self._derivative(self.edm, predict)
            return integrate_back(derivative, x, sigmas, own.sampler) / sigmas[0]
        if own.sampler != "ddim":
            raise UserError(
                "family.sampler: ddpm adds noise on the way, so an image has no one latent: sample "
                "with ddim"
            )
        steps, kind = own.sample_steps, self._prediction
        return invert(self._predict(predict), self.schedule, kind, x, steps, clip=self._bounded)

    def _visited(self) -> tuple[Tensor, dict[str, Any]]:
        if self.edm is not None:
            sigmas = walk_sigmas(self.options.sample_steps, *self.edm.walk)
            found = factors(torch.tensor(sigmas[:-1], dtype=torch.float64), self._sigma_data)
            each = {name: values.tolist() for name, values in found._asdict().items()}
            return found.c_noise.float(), {"sigmas": sigmas, "sampler": self.options.sampler} | each
        visited = time_steps(self.schedule.num_steps, self.options.sample_steps)
        alpha_bar = [float(self.schedule.alpha_bar[t]) for t in visited]
        return torch.tensor(visited), {"time_steps": visited, "alpha_bar": alpha_bar}
