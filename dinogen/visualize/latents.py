"""Draws the latents of projected photos: as they are, with mixed layers, and along directions."""

from __future__ import annotations

import hashlib
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dinogen.errors import UserError
from dinogen.families.abilities import (
    HasFirstLayer,
    HasLatentSpaces,
    LatentSpace,
    spaces_of,
    to_space,
)
from dinogen.files import write_bytes
from dinogen.hub import cached_name, shown, working_path
from dinogen.projection.latents import (
    Projected,
    check_fits,
    decode_projected,
    read_projected,
    snapshot_of,
)
from dinogen.report.images import (
    Sheet,
    png_bytes,
    save_grid,
    save_sheet,
    to_uint8,
    with_watermark,
)
from dinogen.runs.layout import checkpoint_name
from dinogen.training.checkpointing.snapshot import Snapshot
from dinogen.visualize.drawings import NUM_DIRECTIONS, REACH, STEPS, main_directions

_MIX = re.compile(r"(\d+)(?:-(\d+))?=(?:seed:(\d+)|(.+))")
_NUM_MEASURED = 1000


@dataclass(frozen=True)
class Mix:
    """Layers of the generator that read other latents.

    Attributes:
        first: the first of the layers, from 0.
        last: the last of them.
        seed: whose first sample gives the latents; None: ``file`` does.
        file: a projection, or a folder of one.
    """

    first: int
    last: int
    seed: int | None
    file: Path | None

    @classmethod
    def parse(cls, text: str) -> Mix:
        """``4-9=seed:3`` or ``4-9=FILE``; one layer is ``4=...``.

        Raises:
            UserError: another form.
        """
        found = _MIX.fullmatch(text)
        if found is None:
            raise UserError(f"--mix {text}: write LAYERS=SOURCE, as in 4-9=seed:3 or 0-3=FILE")
        first, last, seed, file = found.groups()
        return cls(
            int(first),
            int(last or first),
            None if seed is None else int(seed),
            None if file is None else Path(file),
        )


def write_projections(
    run: Path,
    places: Sequence[Path],
    mixes: Sequence[str] = (),
    resolution: int | None = None,
    watermark: str | None = None,
    out: Path | None = None,
) -> tuple[Snapshot, int, Path]:
    """Draw projected photos, ``NAME.png`` each and a grid; layers may be mixed with others.

    Args:
        run: folder of the run, an exported file, or an address of the hub.
        places: files of `dinogen project`, or folders of them.
        mixes: as :meth:`Mix.parse` reads them; later ones are laid over earlier ones.
        resolution: what the user asks for, if anything.
        watermark: a text to write into each image.
        out: folder; ``RUN/samples/...`` unless given.

    Returns:
        What was drawn from, how many images, and the grid.

    Raises:
        ConfigError: the run does not have the checkpoint of the latents any more.
        UserError: a file is no projection or of another run, or layers do not exist.
    """
    run = working_path(run)
    projected = read_projected(places)
    chosen = [Mix.parse(text) for text in mixes]
    snapshot, space = snapshot_of(run, projected, resolution)
    images = []
    for one in projected:
        if chosen:
            one = mixed(snapshot, space, one, chosen)
        images.append(decode_projected(snapshot, one, one.latents))
    pixels = to_uint8(torch.cat(images).numpy())
    if watermark:
        pixels = with_watermark(pixels, watermark)
    words = ["dinogen", "sample", shown(run)]
    words += [word for place in places for word in ("--latents", str(place))]
    words += [word for text in mixes for word in ("--mix", text)]
    words += ["--watermark", watermark] if watermark else []
    about: dict[str, Any] = {
        "generated": True,
        "run": cached_name(run) or run.resolve().name,
        "family": snapshot.family.config.family.name,
        "resolution": snapshot.resolution,
        "nimg": snapshot.nimg,
        "command": shlex.join(words),
    }
    if out is None:
        said = "\n".join([*(str(one.path.resolve()) for one in projected), *words[3:]])
        name = f"{snapshot.place.name}_{checkpoint_name(snapshot.nimg)}_latents_"
        name += hashlib.sha256(said.encode()).hexdigest()[:8]
        out = snapshot.place.run.samples_folder / name
    for number, (one, image) in enumerate(zip(projected, pixels, strict=True)):
        png = png_bytes(image, about | {"photo": one.title, "photo_sha256": one.info["sha256"]})
        write_bytes(out / f"{number:05d}_{one.title}{snapshot.mark}.png", png)
    grid = out / f"grid_{snapshot.place.name}{snapshot.mark}.png"
    return snapshot, len(projected), save_grid(pixels, grid, about=about)


def mixed(
    snapshot: Snapshot, space: LatentSpace, projected: Projected, mixes: Sequence[Mix]
) -> Projected:
    """A projection whose layers partly read other latents, in the space that has layers.

    Karras et al. 2019, "A Style-Based Generator Architecture for Generative Adversarial Networks",
    section 3.1 (style mixing).

    Raises:
        UserError: the family has no such space, or not these layers; or it is projected in z.
    """
    layers = layers_of(snapshot, space, "--mix")
    found = in_layers(projected.latents, layers).clone()
    num = layers.shape[0]
    for mix in mixes:
        if mix.first > mix.last or mix.last >= num:
            raise UserError(
                f"--mix {mix.first}-{mix.last}: the generator has the layers 0 to {num - 1}"
            )
        if mix.seed is None:
            assert mix.file is not None
            (source, *_) = read_projected([mix.file], "--mix")
            if source.settings["checkpoint"] != projected.settings["checkpoint"]:
                raise UserError(f"--mix {mix.file}: was projected into another checkpoint")
            if source.space == "z":
                raise UserError(f"--mix {mix.file}: latents in z have no layers: project in w+")
            check_fits(snapshot, source, "--mix")
            other = in_layers(source.latents, layers)
        else:
            z = snapshot.family.latents(torch.zeros(1, dtype=torch.int64), mix.seed)
            with torch.no_grad():
                other = to_space(
                    snapshot.family, snapshot.ema.networks, layers.name, z, projected.index
                ).cpu()
        found[:, mix.first : mix.last + 1] = other[:, mix.first : mix.last + 1]
    info = projected.info | {"settings": projected.settings | {"space": layers.name}}
    return Projected(projected.path, info, found, projected.noise)


def layers_of(snapshot: Snapshot, space: LatentSpace, option: str) -> LatentSpace:
    """The space of the family that has a row per layer.

    Raises:
        UserError: there is none, or latents of ``space`` are not rows of it.
    """
    every = spaces_of(snapshot.family).values()
    found = next((one for one in every if one.per_layer), None)
    name = snapshot.family.config.family.name
    if found is None:
        raise UserError(f"{option}: family {name} has no layers that can be chosen: leave it out")
    if space.name == "z":
        raise UserError(f"{option}: latents in z have no layers: project in {found.name}")
    return found


def in_layers(latents: Tensor, layers: LatentSpace) -> Tensor:
    """Latents (N, ...) with a row per layer."""
    if latents.dim() == 1 + len(layers.shape):
        return latents
    return latents[:, None].expand(-1, *layers.shape)


@torch.no_grad()
def write_directions(
    run: Path, places: Sequence[Path], resolution: int | None = None, out: Path | None = None
) -> list[Path]:
    """Draw each projected photo moved along the main directions of its space.

    They are those of ``dinogen look``, around a photo instead of samples; a step is in standard
    deviations of samples along the direction.

    Args:
        run: folder of the run, an exported file, or an address of the hub.
        places: files of `dinogen project`, or folders of them.
        resolution: what the user asks for, if anything.
        out: folder; beside each projection unless given.

    Returns:
        The images.

    Raises:
        ConfigError: the run does not have the checkpoint of the latents any more.
        UserError: a file is no projection or of another run, or its space has no directions.
    """
    run = working_path(run)
    projected = read_projected(places)
    snapshot, space = snapshot_of(run, projected, resolution)
    family, networks = snapshot.family, snapshot.ema.networks
    matrix: Tensor | None = None
    if space.name == "z":
        matrix = family.first_layer(networks) if isinstance(family, HasFirstLayer) else None
    elif isinstance(family, HasLatentSpaces):
        matrix = family.space_matrix(networks, space.name)
    if matrix is None:
        raise UserError(
            f"--latents: latents in {space.name} of family {family.config.family.name} are not "
            "multiplied by a matrix, so there are no directions"
        )
    found = main_directions(matrix, NUM_DIRECTIONS)
    spread = torch.ones(len(found))
    if not space.normal:
        numbers = torch.arange(_NUM_MEASURED)
        samples = to_space(family, networks, space.name, family.latents(numbers, 0), numbers).cpu()
        rows = samples.unflatten(0, (-1,)).reshape(_NUM_MEASURED, -1, samples.shape[-1])[:, 0]
        spread = (rows @ found.T).std(0)
    moves = torch.linspace(-REACH, REACH, STEPS)
    labels = [f"{move:+g}" if move else "0" for move in moves.tolist()]
    left = [str(number) for number in range(1, len(found) + 1)]
    written = []
    for one in projected:
        steps = moves[None, :, None] * (spread[:, None] * found)[:, None]  # (directions, moves, C)
        if space.per_layer:
            steps = steps[:, :, None]
        latents = (one.latents[None] + steps).flatten(0, 1)
        images = decode_projected(snapshot, one, latents)
        folder = one.path.parent if out is None else out / one.title
        path = folder / f"directions{snapshot.mark}.png"
        save_sheet(Sheet(images.numpy(), STEPS, labels, left), path)
        written.append(path)
    return written
