"""Shows projections: an image and a video of each, and a page of all in a folder."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from dinogen.files import write_text
from dinogen.report.images import Sheet, save_sheet, to_uint8
from dinogen.report.video import can_write_mp4, enlarged, tiled, write_video
from dinogen.runs.files import read_object

Pixels = NDArray[np.uint8]

SIDE = 192
FPS = 20
HOLD = 2 * FPS


@dataclass(frozen=True)
class Shown:
    """What is shown of one photo.

    Attributes:
        folder: where.
        crop: (3, R, R) in [-1, 1], what was projected.
        made: (3, R, R), the projection.
        photo: (H, W, 3) uint8, the whole photo; None if it cannot be read any more.
        frames: (3, R, R) each, the projection on its way.
        mark: part of file names that says loudly when a random guide was used.
    """

    folder: Path
    crop: Tensor
    made: Tensor
    photo: Pixels | None
    frames: Sequence[Tensor]
    mark: str


def write_shown(shown: Shown, rms: float) -> dict[str, str | None]:
    """Write the image and, if there was a search, the video; returns their names in the folder.

    Args:
        shown: what is drawn.
        rms: root mean square error, 0 to 255, for the label.
    """
    crop, made = _pixels(shown.crop), _pixels(shown.made)
    # grey is no difference; differences are doubled, as most are small
    difference = crop.astype(np.int16) - made.astype(np.int16)
    grey = np.clip(128 + difference, 0, 255).astype(np.uint8)
    tiles = [] if shown.photo is None else [_within_square(shown.photo, _side(crop))]
    labels = [] if shown.photo is None else ["photo"]
    tiles += [_large(one) for one in (crop, made, grey)]
    labels += ["cut out", "projection", f"difference, rms {rms:.1f}"]
    image = f"projection{shown.mark}.png"
    save_sheet(Sheet(np.stack(tiles), len(tiles), labels), shown.folder / image)
    if not shown.frames:
        return {"image": image, "video": None}
    video = f"projection{shown.mark}.{'mp4' if can_write_mp4() else 'gif'}"

    def frames() -> Any:
        for number, frame in enumerate(shown.frames):
            both = tiled(np.stack([_large(crop), _large(_pixels(frame))]), 2)
            for _ in range(HOLD if number == len(shown.frames) - 1 else 1):
                yield both

    write_video(shown.folder / video, frames(), FPS)
    return {"image": image, "video": video}


def _pixels(image: Tensor) -> Pixels:
    pixels: Pixels = to_uint8(image[None].cpu().numpy())[0]
    return pixels


def _side(image: Pixels) -> int:
    """The side at which an image is shown: whole times its own, at least 192."""
    own = int(image.shape[0])
    return own * max(1, -(-SIDE // own))


def _large(image: Pixels) -> Pixels:
    large: Pixels = enlarged(image[None], _side(image))[0]
    return large


def _within_square(photo: Pixels, side: int) -> Pixels:
    """The whole photo on a white square."""
    image = Image.fromarray(photo)
    scale = side / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    canvas = Image.new("RGB", (side, side), "white")
    corner = ((side - size[0]) // 2, (side - size[1]) // 2)
    canvas.paste(image.resize(size, Image.Resampling.LANCZOS), corner)
    return np.asarray(canvas)


_HEAD = """<!doctype html><html lang="en"><meta charset="utf-8"><title>Projections</title>
<meta name="viewport" content="width=device-width">
<style>body{font:15px/1.5 system-ui,sans-serif;margin:2em auto;max-width:64em;padding:0 1em;
color:#282828}section{border-top:1px solid #ddd;padding:1em 0}h2{font-size:1.05em;margin:0}
img,video{max-width:100%;image-rendering:pixelated}table{border-collapse:collapse}
td,th{padding:0 1.2em 0 0;text-align:left;font-variant-numeric:tabular-nums}
p{margin:.3em 0}.warn{color:#b00020}</style>
<h1>Projections</h1>
<p>Generated images of photos: the latents of which the generator makes them most closely. The
error of the mean image is that of the mean of samples, the best single image for all photos.</p>
"""


def write_page(page: Path, folder: Path, results: str) -> None:
    """Write a page of all projections in a folder.

    Args:
        page: the HTML file.
        folder: with a folder for each photo.
        results: name of the results in each.
    """
    parts = [_HEAD]
    for path in sorted(folder.glob(f"*/{results}")):
        found = read_object(path).value
        if found is not None and "files" in found:
            parts.append(_section(path.parent.name, found))
    write_text(page, "".join(parts))


def _section(name: str, found: dict[str, Any]) -> str:
    files, settings, after = found["files"], found["settings"], found["after"]
    where = html.escape(name, quote=True)
    lines = [f"<section><h2>{where}</h2>"]
    checkpoint = settings["checkpoint"]
    lines.append(
        f"<p>{html.escape(str(found['photo']))}, in {html.escape(settings['space'])} of "
        f"{html.escape(found['run'])} ({html.escape(checkpoint['family'])}, "
        f"{checkpoint['nimg']:,} images), by {html.escape(settings['how'])}; loss: "
        f"{html.escape(found['loss']['what'])}</p>"
    )
    lines += [
        f'<p class="warn">a better loss is not available: {html.escape(reason)}</p>'
        for reason in found["loss"]["better_not_available"]
    ]
    lines.append(f'<img src="{where}/{files["image"]}" alt="photo, crop, projection, difference">')
    if files["video"]:
        source = f"{where}/{files['video']}"
        tag = f'<video src="{source}" controls loop muted></video>'
        lines.append(tag if source.endswith(".mp4") else f'<img src="{source}" alt="the way">')
    lines.append("<table><tr><th>error<th>rms (0 to 255)<th>features<th>loss</tr>")
    rows = {one.replace("_", " "): values for one, values in found["before"].items()}
    for title, values in (rows | {"projection": after}).items():
        cells = f"<td>{values['rms']:.1f}<td>{values['features']:.3f}<td>{values['loss']:.3f}"
        lines.append(f"<tr><td>{title}{cells}</tr>")
    lines.append("</table></section>\n")
    return "\n".join(lines)
