"""Cartoon faces drawn from known attributes, with captions, for tests of text control.

An image follows from its attributes, the seed and its row. Where a shape ends, pixels are mixed by
how much of them it covers. What is not an attribute (place, size, tilt, length of the hair, bend of
the mouth, shade of every colour) is jittered.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from filelock import FileLock

# Words that name nothing else in a caption, so that what an image shows can be told by them.
VALUES = {
    "hair": ("black", "blond", "red", "gray"),
    "glasses": ("no", "yes"),
    "smile": ("no", "yes"),
    "skin": ("pale", "tan", "dark"),
    "background": ("blue", "green", "purple", "white"),
}
NAMES = tuple(VALUES)
HAIR = np.array([[30, 26, 30], [240, 205, 95], [205, 62, 28], [168, 170, 176]], np.float32)
SKIN = np.array([[252, 222, 200], [216, 160, 112], [122, 78, 54]], np.float32)
BACKGROUND = np.array([[70, 120, 215], [70, 165, 85], [145, 85, 185], [238, 238, 242]], np.float32)
SHADE = 10  # levels that a colour is off by, at most

# {} is the value's word. Each is a phrase that can follow any other.
PHRASES = {
    "hair": ("{} hair", "hair that is {}"),
    "skin": ("{} skin", "a {} complexion"),
    "glasses": (("no glasses", "without glasses"), ("glasses", "wearing glasses")),
    "smile": (("frowning", "looking sad"), ("smiling", "with a smile")),
    "background": ("on a {} background", "in front of a {} wall"),
}
OPENINGS = ("a face", "a person", "a cartoon face", "a drawing of a face", "a portrait")


def combinations() -> np.ndarray:
    """(192, 5) int64: every combination of attributes, columns as in ``NAMES``."""
    return np.array(list(itertools.product(*(range(len(VALUES[name])) for name in NAMES))))


def held_out(attributes: np.ndarray) -> np.ndarray:
    """(N, 5) -> (N,) bool: a quarter of all combinations, though every pair of values is seen.

    By colours alone: were glasses or smile part of the rule, the colours of an image would tell
    them in training, and tell them wrongly of what is held out.
    """
    colours = [NAMES.index(name) for name in ("hair", "skin", "background")]
    return attributes[:, colours].sum(1) % 4 == 0


def some_attributes(num: int, seed: int, unseen: bool = False) -> np.ndarray:
    """(num, 5) int64: combinations at random, of those seen in training or of the others."""
    rows = combinations()
    rows = rows[held_out(rows) == unseen]
    return rows[np.random.default_rng([seed, unseen]).integers(len(rows), size=num)]


def draw(attributes: np.ndarray, seed: int, size: int = 32) -> np.ndarray:
    """(N, 5) attributes -> (N, size, size, 3) uint8; another seed draws others of the same kind."""
    # One row of numbers per image, so that none depends on how many there are.
    numbers = np.random.default_rng(seed).random((len(attributes), 16), dtype=np.float32)
    parts = range(0, len(attributes), 32)  # as many at once as a cache holds
    return np.concatenate([_draw(attributes[i : i + 32], numbers[i : i + 32], size) for i in parts])


def _draw(attributes: np.ndarray, numbers: np.ndarray, size: int) -> np.ndarray:
    hair, glasses, smile, skin, background = attributes.T
    num = len(attributes)
    columns = iter(numbers.T)

    def jitter(low: float, high: float) -> np.ndarray:
        return (low + (high - low) * next(columns))[:, None, None]

    unit = size * jitter(0.30, 0.36)  # pixels per half a head
    tilt = np.radians(jitter(-6, 6))
    middle = np.arange(size, dtype=np.float32) + 0.5
    across = (middle[None, None, :] - size * jitter(0.46, 0.54)) / unit
    down = (middle[None, :, None] - size * jitter(0.45, 0.52)) / unit
    x = across * np.cos(tilt) + down * np.sin(tilt)
    y = down * np.cos(tilt) - across * np.sin(tilt)
    length = jitter(0.0, 1.0)  # of the hair

    def shade(colours: np.ndarray) -> np.ndarray:
        return colours + SHADE * (2 * np.stack([next(columns) for _ in range(3)], 1) - 1)

    def ellipse(cx, cy, rx, ry) -> np.ndarray:
        """Distance to the edge, about, in units; negative inside."""
        return (np.hypot((x - cx) / rx, (y - cy) / ry) - 1) * np.minimum(rx, ry)

    image = np.broadcast_to(shade(BACKGROUND[background])[:, None, None], (num, size, size, 3))

    def paint(distance: np.ndarray, colours: np.ndarray, where: np.ndarray | float = 1.0) -> None:
        nonlocal image
        cover = np.clip(0.5 - distance * unit, 0, 1) * where
        image = image + cover[..., None] * (colours[:, None, None] - image)

    hair_colour, skin_colour = shade(HAIR[hair]), shade(SKIN[skin])
    black = np.tile(np.array([[28, 26, 34]], np.float32), (num, 1))
    white = np.full((num, 3), 245, np.float32)
    lips = 0.25 * skin_colour + 0.75 * np.array([150, 20, 40], np.float32)
    shirt = np.tile(np.array([[90, 95, 105]], np.float32), (num, 1))

    behind = np.maximum(np.abs(x) - 0.88, np.abs(y - 0.1 - 0.4 * length) - 0.2 - 0.4 * length)
    paint(np.minimum(ellipse(0, -0.18, 0.92, 0.98), behind), hair_colour)
    paint(np.maximum(np.abs(x) - 0.26, np.abs(y - 1.1) - 0.4), 0.88 * skin_colour)
    paint(ellipse(0, 1.95, 1.2, 0.75), shirt)
    paint(ellipse(0, 0.12, 0.72, 0.88), skin_colour)
    fringe = np.maximum(ellipse(0, -0.14, 0.84, 0.94), y + 0.38 - 0.18 * x * (2 * length - 1))
    paint(fringe, hair_colour)
    for side in (-1, 1):
        paint(ellipse(0.31 * side, 0.03, 0.15, 0.11), white)
        paint(ellipse(0.31 * side, 0.03, 0.09, 0.10), black)
    paint(ellipse(0, 0.28, 0.07, 0.10), 0.82 * skin_colour)

    bend = np.where(smile, 1.0, -1.0).astype(np.float32)[:, None, None] * jitter(0.28, 0.38)
    height = 0.62 + bend * (0.4 - (x / 0.42) ** 2)  # y grows downwards: a smile's middle is low
    slope = -2 * bend * x / 0.42**2
    mouth = np.maximum(np.abs(y - height) / np.hypot(1, slope) - 0.07, np.abs(x) - 0.42)
    paint(mouth, lips)

    worn = glasses.astype(np.float32)[:, None, None]
    for side in (-1, 1):
        paint(ellipse(0.32 * side, 0.03, 0.25, 0.23), white, 0.25 * worn)
        paint(np.abs(ellipse(0.32 * side, 0.03, 0.25, 0.23)) - 0.045, black, worn)
        paint(np.maximum(np.abs(y) - 0.04, np.abs(x - 0.64 * side) - 0.1), black, worn)
    paint(np.maximum(np.abs(y) - 0.04, np.abs(x) - 0.08), black, worn)
    return np.clip(image + 0.5, 0, 255).astype(np.uint8)


def phrase(name: str, value: int, wording: int = 0) -> str:
    """What a caption says of one attribute."""
    wordings = PHRASES[name]
    if name in ("glasses", "smile"):
        return wordings[value][wording]
    return wordings[wording].format(VALUES[name][value])


def caption(attributes: np.ndarray, names: tuple[str, ...] = NAMES) -> str:
    """The plain caption of one image (5,), naming ``names``.

    Such as "a face, red hair, tan skin, glasses, smiling, on a blue background".
    """
    order = ("hair", "skin", "glasses", "smile", "background")
    said = [phrase(name, attributes[NAMES.index(name)]) for name in order if name in names]
    return ", ".join(["a face", *said])


def some_captions(
    attributes: np.ndarray, seed: int, share: float = 1.0
) -> tuple[list[str], np.ndarray]:
    """A caption each of (N, 5), in some wording and order, naming some of the attributes.

    Args:
        attributes: of the images.
        seed: of the wordings.
        share: chance that an attribute is named; one is always.

    Returns:
        The captions, and (N, 5) bool: what each names.
    """
    rng = np.random.default_rng(seed)
    captions, named = [], np.zeros(attributes.shape, bool)
    for number, row in enumerate(attributes):
        order = rng.permutation(len(NAMES))
        chosen = [i for i in order if rng.random() < share] or [order[0]]
        said = [phrase(NAMES[i], row[i], rng.integers(2)) for i in chosen]
        captions.append(", ".join([OPENINGS[rng.integers(len(OPENINGS))], *said]))
        named[number, chosen] = True
    return captions, named


def as_tensor(images: np.ndarray):
    """(N, S, S, 3) uint8 -> (N, 3, S, S) float32 in [-1, 1]."""
    import torch

    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def made_once(tmp_path_factory, name: str, make: Callable[[Path], object]) -> Path:
    """What ``make`` writes at a path, once for all processes of a test run."""
    base = tmp_path_factory.getbasetemp()
    path = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    with FileLock(f"{path}.lock"):
        if not path.exists():
            partial = path.with_name(f"{name}.partial")
            make(partial)
            partial.rename(path)
    return path
