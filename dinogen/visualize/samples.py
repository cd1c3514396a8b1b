"""Images of ``dinogen sample``: PNGs that say where they come from, and one grid."""

from __future__ import annotations

import hashlib
import re
import shlex
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from dinogen.errors import UserError
from dinogen.families.abilities import (
    AdjustsSampling,
    Conditional,
    adjustable,
    num_classes_of,
    truncates,
)
from dinogen.files import write_bytes, write_text
from dinogen.hub import cached_name, shown, working_path
from dinogen.report.images import png_bytes, save_grid, to_uint8, with_watermark
from dinogen.runs.layout import checkpoint_name
from dinogen.training.checkpointing.snapshot import Snapshot, load_snapshot


@dataclass(frozen=True)
class SampleRequest:
    """What is drawn.

    Attributes:
        source: folder of a run, an exported file, or an address of the hub.
        num: images.
        seed: of the draws.
        resolution: the stage; the largest trained unless given.
        texts: prompts, which take turns.
        psi: truncation, 0 the mean and 1 none.
        label: the class; None for all of them in turn.
        sampling: ``steps``, ``sampler`` and ``guidance``, as far as they are given.
        watermark: a text to write into each image.
    """

    source: Path
    num: int
    seed: int = 0
    resolution: int | None = None
    texts: tuple[str, ...] = ()
    psi: float = 1.0
    label: int | None = None
    sampling: dict[str, Any] = field(default_factory=dict)
    watermark: str | None = None

    @property
    def options(self) -> list[tuple[str, Any]]:
        """Options and values beyond --num, --seed and --stage, as on the command line."""
        given: list[tuple[str, Any]] = [("text", text) for text in self.texts]
        given += [("psi", self.psi)] if self.psi != 1 else []
        given += [("class", self.label)] if self.label is not None else []
        given += list(self.sampling.items())
        return given + ([("watermark", self.watermark)] if self.watermark else [])


def write_samples(request: SampleRequest, out: Path | None = None) -> tuple[Snapshot, Path]:
    """Draw and write ``00000.png`` and so on, and ``grid_RxR.png``.

    The text ``dinogen`` of each PNG is JSON: run, family, stage, images seen, seed, number, and the
    command that draws it again.

    Args:
        request: what is drawn.
        out: folder; ``RUN/samples/...`` unless given.

    Returns:
        What was drawn from, and the grid.

    Raises:
        ConfigError: no such run, file or stage.
        UserError: the family cannot do what an option asks for; names the option.
    """
    request = replace(request, source=working_path(request.source))
    snapshot = load_snapshot(request.source, request.resolution)
    _check(request, snapshot)
    guidance = request.sampling.get("guidance", 1.0)
    condition = snapshot.condition(request.texts, guidance) if request.texts else None
    if request.sampling and not request.texts:
        assert isinstance(snapshot.family, AdjustsSampling)
        snapshot = replace(snapshot, family=snapshot.family.with_sampling(request.sampling))
    numbers = torch.arange(request.num)
    if request.psi == 1 and request.label is None:
        images = snapshot.sample(request.num, request.seed, condition)
    else:
        if request.label is not None:
            numbers = numbers * num_classes_of(snapshot.family) + request.label
        images = snapshot.sample_numbers(numbers, request.seed, request.psi)
    pixels = to_uint8(images.numpy())
    if request.watermark:
        pixels = with_watermark(pixels, request.watermark)
    folder = out or snapshot.place.run.samples_folder / _name(request, snapshot)
    about = _about(request, snapshot)
    for place, (number, image) in enumerate(zip(numbers.tolist(), pixels, strict=True)):
        png = png_bytes(image, about | {"number": number})
        write_bytes(folder / f"{place:05d}{snapshot.mark}.png", png)
    if request.texts:
        write_text(folder / "prompts.txt", "".join(f"{text}\n" for text in request.texts))
    grid = folder / f"grid_{snapshot.place.name}{snapshot.mark}.png"
    return snapshot, save_grid(pixels, grid, about=about)


def _check(request: SampleRequest, snapshot: Snapshot) -> None:
    """Refuse options that the family, as configured, cannot follow.

    Raises:
        UserError: naming the option.
    """
    family = snapshot.family
    name = f"family {family.config.family.name}"
    if request.psi != 1 and not truncates(family):
        raise UserError(f"--psi: {name} does not truncate: leave it out")
    num_classes = num_classes_of(family)
    if request.label is not None and not num_classes:
        raise UserError(f"--class: {name}, as it was trained, has no classes: leave it out")
    if request.label is not None and request.label >= num_classes:
        raise UserError(f"--class {request.label}: classes are 0 to {num_classes - 1}")
    for option in ("steps", "sampler"):
        if option in request.sampling and (request.texts or option not in adjustable(family)):
            raise UserError(f"--{option}: {name} does not sample in steps: leave it out")
    if "guidance" in request.sampling and not (request.texts or "guidance" in adjustable(family)):
        if isinstance(family, Conditional) and not num_classes:
            raise UserError("--guidance exaggerates what --text asks for: say that as well")
        if num_classes:
            raise UserError(f"--guidance: {name} was trained with one strength: leave it out")
        raise UserError(
            f"--guidance: {name} has neither --text nor classes to be guided by: leave it out"
        )


def _about(request: SampleRequest, snapshot: Snapshot) -> dict[str, Any]:
    """Where images come from; JSON-ready."""
    words = ["dinogen", "sample", shown(request.source), "--num", str(request.num)]
    words += ["--seed", str(request.seed), "--stage", str(snapshot.resolution)]
    words += [word for name, value in request.options for word in (f"--{name}", str(value))]
    facts = snapshot.checkpoint.state["facts"]
    return {
        "generated": True,
        "run": cached_name(request.source) or request.source.resolve().name,
        "family": snapshot.family.config.family.name,
        "resolution": snapshot.resolution,
        "nimg": snapshot.nimg,
        "guide": facts.get("guide_label"),
        "random_guide": bool(facts.get("random_guide")),
        "seed": request.seed,
        "command": shlex.join(words),
    }


def _name(request: SampleRequest, snapshot: Snapshot) -> str:
    """Name of the folder, another one for other options."""
    name = f"{snapshot.place.name}_{checkpoint_name(snapshot.nimg)}_seed{request.seed}"
    if request.texts:
        name += f"_{text_mark(request.texts, request.sampling.get('guidance', 1.0))}"
    for option, value in request.options:
        if option == "watermark":
            name += "_watermark"
        elif option != "text" and not (option == "guidance" and request.texts):
            name += f"_{option}{value}"
    return name


def text_mark(texts: tuple[str, ...], guidance: float) -> str:
    """Part of a folder's name that tells other prompts from these."""
    words = re.sub(r"[^a-z0-9]+", "-", " ".join(texts).lower()).strip("-")[:40]
    digest = hashlib.sha256("\n".join(texts).encode()).hexdigest()[:8]
    return f"{words}_{digest}_g{guidance:g}"
