"""A run's generator in the format that is asked for: the table of formats."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dinogen.config import ConfigError
from dinogen.formats import diffusers, traced
from dinogen.training.checkpointing.export import (
    Exported,
    Generator,
    check_name,
    generator_with_card,
    warn_if_random,
    write_safetensors,
)


@dataclass(frozen=True)
class Format:
    """One way to write a generator.

    Attributes:
        suffix: of the file; empty for a format that is a folder.
        write: (generator, path) -> the largest difference from the network, None if the very
            tensors are written; whole or not at all.
        takes: whether a generator can be written so.
    """

    suffix: str
    write: Callable[[Generator, Path], float | None]
    takes: Callable[[Generator], bool]


FORMATS = {
    "safetensors": Format(".safetensors", write_safetensors, lambda generator: True),
    "torch-export": Format(".pt2", traced.write_torch_export, traced.takes),
    "onnx": Format(".onnx", traced.write_onnx, traced.takes),
    "diffusers": Format("", diffusers.write, diffusers.takes),
}


def export(
    run: Path,
    path: Path,
    kind: str = "safetensors",
    resolution: int | None = None,
    nimg: int | None = None,
    licence: str | None = None,
    intended_use: str | None = None,
) -> Exported:
    """Write the moving average of a checkpoint's generator, in one of ``FORMATS``.

    Args:
        run: folder of the run, or a file that ``dinogen export`` wrote as safetensors.
        path: the file or folder; a file that is there is replaced.
        kind: of format, a key of ``FORMATS``.
        resolution: which stage; the largest that has a checkpoint unless given.
        nimg: which checkpoint; the newest unless given.
        licence: of the weights, for the card.
        intended_use: for the card.

    Raises:
        ConfigError: no such checkpoint or format, ``path`` is no name for it, or the family has no
            such format.
        ExportError: what would be written does not compute what the network does.
    """
    chosen = FORMATS.get(kind)
    if chosen is None:
        raise ConfigError(f"--format {kind}: choose from {', '.join(FORMATS)}")
    _check_name(path, kind)
    generator = generator_with_card(run, resolution, nimg, licence, intended_use)
    if not chosen.takes(generator):
        others = [name for name, one in FORMATS.items() if one.takes(generator)]
        raise ConfigError(
            f"{run}: family {generator.info['family']} cannot be written as {kind}: give "
            f"--format {' or '.join(others)}"
        )
    difference = chosen.write(generator, path)
    warn_if_random(generator, path)
    return Exported(path, generator.info, generator.num_parameters, difference)


def _check_name(path: Path, kind: str) -> None:
    """Refuse a path that does not fit the format.

    Raises:
        ConfigError: naming a path or a format that would.
    """
    suffix = FORMATS[kind].suffix
    fitting = [name for name, one in FORMATS.items() if one.suffix and one.suffix == path.suffix]
    hint = f", or give --format {fitting[0]}" if fitting else ""
    if suffix:
        check_name(path, suffix, hint)
    elif fitting or path.is_file():
        raise ConfigError(f"{path}: --format {kind} writes a folder: name one{hint}")
