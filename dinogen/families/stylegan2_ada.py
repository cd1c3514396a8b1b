"""Family `stylegan2_ada`: StyleGAN2 with adaptive discriminator augmentation, for little data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from dinogen.batch import Batch, Losses, Scalars
from dinogen.config import Config, StageConfig
from dinogen.distributed import rng
from dinogen.families.abilities import LatentSpace
from dinogen.families.base import Graph, Inputs, Networks, Phase, classes_of, judged_alone
from dinogen.families.gan import Gan
from dinogen.losses.adversarial import bce_d, bce_g, path_lengths, r1_penalty
from dinogen.networks.ada.pipeline import Strengths, augment
from dinogen.networks.stylegan2.discriminator import StyleGAN2Discriminator
from dinogen.networks.stylegan2.generator import ModulatedConv, StyleGAN2Generator
from dinogen.networks.stylegan2.layers import Dense
from dinogen.transfer import to_device, to_device_together

# Karras et al. 2020, "Analyzing and Improving the Image Quality of StyleGAN", appendix B
PATH_DECAY = 0.01
W_DECAY = 0.002
# what the authors' "auto" configuration takes for gamma: this times resolution**2 / batch
R1_HEURISTIC = 0.0002


class StyleGAN2Ada(Gan):
    """Karras et al. 2020, "Training Generative Adversarial Networks with Limited Data".

    Non-saturating loss, R1 and path length regularisation in every n-th step, style mixing. What D
    is shown, real and generated, goes through the augmentation pipeline with probability p, which
    rises while D's logits of real images are positive too often, and falls otherwise.
    """

    class Options(Gan.Options):
        """Keys of ``family:`` for ``name: stylegan2_ada``."""

        w_dim: int = Field(512, ge=1, description="size of the mapped latent")
        num_mapping_layers: int = Field(2, ge=1, description="dense layers from z to w")
        channel_base: int = Field(16384, ge=4, description="channels at R are base / R ...")
        channel_max: int = Field(512, ge=1, description="... and at most this")
        num_half: int = Field(
            4,
            ge=0,
            description="number of the largest resolutions that follow engine.precision; the "
            "others are float32",
        )
        num_classes: int = Field(0, ge=0, description="labels are 0 to this less 1; 0: no labels")
        group_size: int = Field(4, ge=1, description="samples per minibatch standard deviation")
        r1_gamma: float | None = Field(
            None,
            gt=0,
            description="R1 is gamma / 2 times the penalty; 0.0002 * resolution^2 / "
            "batch unless given",
        )
        r1_every: int = Field(16, ge=1, description="steps between updates by R1")
        path_weight: float = Field(
            2.0, ge=0, description="weight of the path length penalty; 0 leaves it out"
        )
        path_every: int = Field(4, ge=1, description="steps between updates by path length")
        style_mixing: float = Field(0.9, ge=0, le=1, description="share of images of two latents")
        truncation: float = Field(
            1.0, ge=0, le=1, description="of samples: 0 the mean w, 1 every w as it is"
        )
        ada_target: float = Field(0.6, gt=-1, lt=1, description="mean sign of D(real) aimed at")
        ada_kimg: float = Field(
            500.0, gt=0, description="thousands of images in which p can go from 0 to 1"
        )
        ada_blit: float = Field(1.0, ge=0, description="p is times this for flips, turns, shifts")
        ada_geometry: float = Field(1.0, ge=0, description="... scaling, rotation, translation")
        ada_color: float = Field(1.0, ge=0, description="... brightness, contrast, hue and such")
        ada_filter: float = Field(0.0, ge=0, description="... strength of frequency bands")
        ada_corruption: float = Field(0.0, ge=0, description="... noise and cutout")

    options: Options
    G: StyleGAN2Generator
    D: StyleGAN2Discriminator

    def __init__(self, config: Config, stage: StageConfig, device: torch.device) -> None:
        super().__init__(config, stage, device)
        self.G = StyleGAN2Generator(**self.arguments("G")).to(device)
        self.D = StyleGAN2Discriminator(**self.arguments("D")).to(device)
        own = self.options
        self.strengths = Strengths(
            own.ada_blit, own.ada_geometry, own.ada_color, own.ada_filter, own.ada_corruption
        )
        self.r1_gamma = own.r1_gamma or R1_HEURISTIC * stage.resolution**2 / stage.batch

    @property
    def phases(self) -> tuple[Phase, ...]:
        """D, now and then R1; G, now and then path length."""
        own = self.options
        phases = (
            Phase("D", "D", self._d_losses, remembered=("sign",)),
            Phase("D_reg", "D", self._r1, every=own.r1_every, second_order=True),
            Phase("G", "G", self._g_losses, remembered=("w",)),
        )
        if not own.path_weight:
            return phases
        lazy = Phase(
            "G_reg",
            "G",
            self._path,
            every=own.path_every,
            remembered=("length",),
            second_order=True,
        )
        return (*phases, lazy)

    @property
    def main_loss(self) -> str:
        """G's own loss."""
        return "G"

    @property
    def inputs(self) -> Inputs:
        """Images, and labels if there are classes."""
        return Inputs(image_size=self.stage.resolution, labels=bool(self.options.num_classes))

    def decode(
        self, networks: Networks, latents: Tensor, indices: Tensor, seed: int, psi: float = 1.0
    ) -> Tensor:
        """All with the same constant noise; ``psi`` on top of the samples' own truncation."""
        psi = psi * self.options.truncation
        images: Tensor = networks["G"](latents, self._label(indices), psi=psi)
        return images.clamp(-1, 1)

    def measured(
        self, networks: Networks, indices: Tensor, seed: int, shares: Sequence[float] | None
    ) -> Tensor:
        """With noise of each image's own, as the authors measure, and classes as in the data."""
        G = networks["G"]
        assert isinstance(G, StyleGAN2Generator)
        label = self._label(indices)
        if label is not None and shares is not None:
            label = classes_of(indices, shares).to(self.device)
        shape = (G.synthesis.num_noise,)
        noise = rng.normal(seed, "sample/noise", indices, shape, self.device)
        latents = self.latents(indices, seed)
        images: Tensor = G(latents, label, noise, psi=self.options.truncation)
        return images.clamp(-1, 1)

    @property
    def measured_as(self) -> dict[str, Any]:
        """Noise is drawn per image."""
        return {"noise": "per image"}

    @property
    def num_classes(self) -> int:
        """0 if it was trained without labels."""
        return self.options.num_classes

    @property
    def truncates(self) -> bool:
        """Towards the mean w."""
        return True

    def realism(self, images: Tensor) -> Tensor:
        """D's logits of images as they are; with classes, as the one that fits best."""
        num_classes = self.options.num_classes
        if not num_classes:
            return judged_alone(self.D, images)
        labels = torch.arange(num_classes, device=self.device).split(1)
        return torch.stack([judged_alone(self.D, images, label) for label in labels]).amax(0)

    def first_layer(self, networks: Networks) -> Tensor:
        """The mapping's, which reads the direction of z alone."""
        G = networks["G"]
        assert isinstance(G, StyleGAN2Generator)
        first = G.mapping.layers[0]
        assert isinstance(first, Dense)
        return first.weight.detach()[:, : self.options.z_dim]

    def mix(
        self, networks: Networks, coarse: Tensor, fine: Tensor, indices: Tensor, seed: int
    ) -> Tensor:
        """The lower half of the layers by the w of ``coarse``, the others by that of ``fine``."""
        G = networks["G"]
        assert isinstance(G, StyleGAN2Generator)
        label, psi = self._label(indices), self.options.truncation
        low, high = (G.broadcast(G.truncate(G.mapping(z, label), psi)) for z in (coarse, fine))
        cut = G.synthesis.num_ws // 2
        images: Tensor = G.synthesis(torch.cat([low[:, :cut], high[:, cut:]], 1))
        return images.clamp(-1, 1)

    def graph(self, networks: Networks) -> Graph:
        """z, psi and label, if there are classes, to images with constant noise."""
        G, psi = networks["G"], self.options.truncation
        assert isinstance(G, StyleGAN2Generator)

        def inputs(indices: Tensor, seed: int) -> dict[str, Tensor]:
            found = {"z": self.latents(indices, seed), "psi": torch.tensor(psi)}
            label = self._label(indices)
            return found if label is None else found | {"label": label}

        return Graph(_Truncated(G), inputs, facts={"psi": psi})

    def layers(self, network: str) -> list[set[str]]:
        """D's down to 4x4, as the authors count them: FromRGB, and three in each block."""
        found = super().layers(network)
        return [one for one in found if min(one).startswith(("from_rgb.", "blocks."))]

    @property
    def spaces(self) -> tuple[LatentSpace, ...]:
        """W, and W+ with a w for each layer (Abdal et al. 2019, "Image2StyleGAN")."""
        synthesis, own = self.G.synthesis, self.options.w_dim
        sides = synthesis.noise_sides
        return (
            LatentSpace("w", (own,), noise_sides=sides),
            LatentSpace("w+", (synthesis.num_ws, own), per_layer=True, noise_sides=sides),
        )

    def to_space(
        self, networks: Networks, space: str, latents: Tensor, indices: Tensor, psi: float = 1.0
    ) -> Tensor:
        """What the mapping makes of z, truncated as samples are."""
        G = networks["G"]
        assert isinstance(G, StyleGAN2Generator)
        w = G.truncate(G.mapping(latents, self._label(indices)), psi * self.options.truncation)
        return w if space == "w" else G.broadcast(w)

    def decode_in(
        self, networks: Networks, space: str, latents: Tensor, noise: Tensor | None = None
    ) -> Tensor:
        """The synthesis network alone."""
        G = networks["G"]
        assert isinstance(G, StyleGAN2Generator)
        images: Tensor = G.synthesis(G.broadcast(latents) if space == "w" else latents, noise)
        return images

    def space_matrix(self, networks: Networks, space: str) -> Tensor:
        """The layers that read w, one below the other."""
        layers = [one for one in networks["G"].modules() if isinstance(one, ModulatedConv)]
        return torch.cat([one.affine.weight.detach() for one in layers])

    def arguments(self, network: str) -> dict[str, Any]:
        """Of G or D."""
        names = ("num_classes", "channel_base", "channel_max", "num_half")
        own = ("z_dim", "w_dim", "num_mapping_layers") if network == "G" else ("group_size",)
        chosen = {name: getattr(self.options, name) for name in (*names, *own)}
        return {"resolution": self.stage.resolution} | chosen

    def optimizer_scale(self, network: str) -> float:
        """k / (k + 1), as each network has a further update in k steps."""
        every = self.options.r1_every if network == "D" else self.options.path_every
        if network == "G" and not self.options.path_weight:
            return 1.0
        return every / (every + 1)

    @torch.no_grad()
    def remember(self, phase: str, means: Scalars) -> None:
        """Move ADA's p, the mean of w, the mean path length."""
        own = self.options
        if phase == "D":
            self.D.ada.update(means["sign"], self.stage.batch, own.ada_target, own.ada_kimg)
        elif phase == "G":
            self.G.w_avg.lerp_(means["w"], W_DECAY)
        elif phase == "G_reg":
            self.G.path_mean.lerp_(means["length"], PATH_DECAY)

    def _d_losses(self, batch: Batch) -> Losses:
        positions, label = batch["position"], batch.get("label")
        _, ws = self._styles("D", positions, label)
        # apart: a group of the minibatch standard deviation is all real or all generated
        fake = self._logits("D/fake", self._images("D", positions, ws), positions, label)
        real = self._logits("D/real", batch["image"], positions, label)
        report = {
            "sign": real.detach().sign().mean(),
            "p": self.D.ada.p,
            "real": real.detach().mean(),
            "fake": fake.detach().mean(),
        }
        return {"bce": bce_d(real, fake)}, report

    def _r1(self, batch: Batch) -> Losses:
        def logits_of(images: Tensor) -> Tensor:
            return self._logits("D_reg", images, batch["position"], batch.get("label"))

        penalty = r1_penalty(logits_of, batch["image"])
        weight = self.r1_gamma / 2 * self.options.r1_every
        return {"r1": weight * penalty}, {"penalty": penalty.detach()}

    def _g_losses(self, batch: Batch) -> Losses:
        positions, label = batch["position"], batch.get("label")
        w, ws = self._styles("G", positions, label)
        fake = self._logits("G", self._images("G", positions, ws), positions, label)
        return {"bce": bce_g(fake)}, {"w": w.detach().mean(0)}

    def _path(self, batch: Batch) -> Losses:
        """On half of the samples, as it takes much memory: those at even positions.

        Of a global batch of even size that is exactly half, however it is cut. A sample counts 2,
        and a part without any takes one that counts 0.
        """
        even = batch["position"] % 2 == 0
        chosen = even.nonzero().flatten() if even.any() else torch.zeros(1, dtype=torch.int64)
        positions = batch["position"][chosen]
        share = 2 * even[chosen] / len(even)
        chosen, share = to_device_together([chosen, share], self.device)
        label = batch["label"].index_select(0, chosen) if self.options.num_classes else None
        with torch.autocast(self.device.type, enabled=False):
            _, ws = self._styles("G_reg", positions, label)
            images = self._images("G_reg", positions, ws)
            lengths = path_lengths(images, ws, self._normal("y", positions, *images.shape[1:]))
            penalty = ((lengths - self.G.path_mean).square() * share).sum()
            # ToRGB's bias moves no path, but every parameter has to get a gradient
            weight = self.options.path_weight * self.options.path_every
            loss = weight * penalty + 0 * images.sum()
        length = (lengths.detach() * share).sum()
        return {"path": loss}, {"penalty": penalty.detach(), "length": length}

    def _styles(
        self, purpose: str, positions: Tensor, label: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """w (B, w_dim), and ws (B, num_ws, w_dim), of which some change to another w on the way."""
        w = self.G.mapping(self._normal(f"z/{purpose}", positions, self.options.z_dim), label)
        ws = self.G.broadcast(w)
        if self.options.style_mixing:
            z = self._normal(f"z_mixed/{purpose}", positions, self.options.z_dim)
            other = self.G.broadcast(self.G.mapping(z, label))
            seed, num_ws = self.config.seed, self.G.synthesis.num_ws
            mixed = rng.uniform(seed, f"mix/{purpose}", positions) < self.options.style_mixing
            cut = 1 + rng.integers(seed, f"cut/{purpose}", positions, high=num_ws - 1)
            changed = mixed[:, None] & (torch.arange(num_ws) >= cut[:, None])
            ws = torch.where(to_device(changed, self.device)[:, :, None], other, ws)
        return w, ws

    def _images(self, purpose: str, positions: Tensor, ws: Tensor) -> Tensor:
        noise = self._normal(f"noise/{purpose}", positions, self.G.synthesis.num_noise)
        images: Tensor = self.G.synthesis(ws, noise)
        return images

    def _logits(
        self, purpose: str, images: Tensor, positions: Tensor, label: Tensor | None
    ) -> Tensor:
        """D's logits (B,) of augmented images."""
        p, choice = self.D.ada.candidates(begins=purpose.startswith("D/"))
        seed, strengths = self.config.seed, self.strengths
        x = augment(images, p, seed, f"ada/{purpose}", positions, strengths, choice)
        logits: Tensor = self.D(x, label)
        return logits

    def _label(self, indices: Tensor) -> Tensor | None:
        """Classes (N,) of sample numbers, in turn; None if there are none."""
        num_classes = self.options.num_classes
        return (indices % num_classes).to(self.device) if num_classes else None

    def _normal(self, purpose: str, positions: Tensor, *shape: int) -> Tensor:
        return rng.normal(self.config.seed, purpose, positions, shape, self.device)


class _Truncated(nn.Module):
    """What :meth:`StyleGAN2Ada.decode` does, with psi as a tensor."""

    def __init__(self, G: StyleGAN2Generator) -> None:
        super().__init__()
        self.G = G

    def forward(self, z: Tensor, psi: Tensor, label: Tensor | None = None) -> Tensor:
        """z (B, z_dim), psi (), label (B,) int64 -> images (B, 3, R, R) float32 in [-1, 1]."""
        images: Tensor = self.G(z, label, psi=psi)
        return images.clamp(-1, 1)
