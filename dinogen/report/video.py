"""Videos as MP4 (H.264, by imageio-ffmpeg) and GIF, written frame by frame."""

from __future__ import annotations

import importlib.util
import re
import subprocess
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from PIL.GifImagePlugin import getdata

from dinogen.errors import UserError
from dinogen.files import written_beside

SUFFIXES = (".mp4", ".gif")
MISSING = "imageio-ffmpeg, which mp4 takes, is not installed: pip install 'dinogen[video]'"
# GIF counts in hundredths of a second, and players show less than 2 of them as 10.
_GIF_TICK = 100
MAX_GIF_FPS = 50
# Of a side: libx264 takes no more, and GIF has two bytes for it. Of a frame: it is 400 MB then.
MAX_SIDE = {".mp4": 16384, ".gif": 65535}
MAX_PIXELS = 2**27

Frame = NDArray[np.uint8]


def can_write_mp4() -> bool:
    """Whether imageio-ffmpeg is installed."""
    return importlib.util.find_spec("imageio_ffmpeg") is not None


def write_video(path: Path, frames: Iterable[Frame], fps: int) -> int:
    """Write a video, whole or not at all; frames are taken one by one.

    MP4 is H.264 in yuv420p, which every player reads; its sides are even, so an odd one is
    extended by its last row or column. A GIF repeats for ever, with a palette per frame.

    Args:
        path: ``*.mp4`` or ``*.gif``; its folder is created.
        frames: (H, W, 3) uint8 RGB, all of one size; at least one.
        fps: frames per second.

    Returns:
        The number of frames.

    Raises:
        UserError: another suffix, more than 50 frames per second of a GIF, no imageio-ffmpeg, or
            ffmpeg fails.
        OSError: the file cannot be written.
    """
    check_video(path, fps)
    return _write_gif(path, frames, fps) if path.suffix == ".gif" else _write_mp4(path, frames, fps)


def check_video(path: Path, fps: int) -> None:
    """Refuse what :func:`write_video` would refuse.

    Raises:
        UserError: as there.
    """
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path}: a video is {' or '.join(SUFFIXES)}: choose one of them")
    if path.suffix == ".mp4" and not can_write_mp4():
        raise UserError(f"{path}: {MISSING}, or choose .gif")
    if path.suffix == ".gif" and fps > MAX_GIF_FPS:
        raise UserError(f"--fps {fps}: a GIF has at most {MAX_GIF_FPS} frames per second")


def check_frames(path: Path, columns: int, rows: int, size: int) -> None:
    """Refuse frames that are too large for the format.

    Args:
        path: of the video.
        columns: of images in a frame.
        rows: of images in a frame.
        size: side of each image, in pixels.

    Raises:
        UserError: they are.
    """
    width, height = columns * size, rows * size
    most = MAX_SIDE[path.suffix]
    if max(width, height) > most or width * height > MAX_PIXELS:
        raise UserError(
            f"--grid {columns}x{rows}: with images of {size} pixels a frame is {width}x{height}, "
            f"and a {path.suffix} has sides up to {most} and {MAX_PIXELS:,} pixels in all: choose "
            "a smaller --grid or --size"
        )


def _even(frame: Frame) -> Frame:
    height, width = frame.shape[:2]
    if height % 2 or width % 2:
        frame = np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), "edge")
    return np.ascontiguousarray(frame)


def _write_mp4(path: Path, frames: Iterable[Frame], fps: int) -> int:
    num, encoder = 0, None
    with written_beside(path) as temporary, TemporaryFile() as said:
        try:
            for frame in frames:
                even = _even(frame)
                if encoder is None:
                    encoder = _start_encoder(temporary, even, fps, said)
                assert encoder.stdin is not None
                encoder.stdin.write(even.data)
                num += 1
            if encoder is None:
                raise ValueError(f"{path}: a video of no frames")
            encoder.communicate()  # the rest of what is buffered, and the end of the input
        except BrokenPipeError:
            assert encoder is not None
            encoder.wait()  # it has ended already, and says why
        finally:
            if encoder is not None:
                encoder.kill()  # nothing, where it has ended
                encoder.wait()
                assert encoder.stdin is not None
                with suppress(BrokenPipeError):
                    encoder.stdin.close()
        if encoder.returncode:
            said.seek(0)
            lines = said.read().decode("utf-8", "replace").strip().splitlines()
            # the first is the cause; before it stand the part that says it, and an address
            first = re.sub(r"^\[[^]]*\] ", "", lines[0]) if lines else ""
            why = first or f"exit status {encoder.returncode}"
            raise UserError(
                f"{path}: ffmpeg failed ({why}): look for a full disk, or choose smaller frames"
            )
    return num


def _start_encoder(file: Path, frame: Frame, fps: int, said: IO[bytes]) -> subprocess.Popen[bytes]:
    """ffmpeg, which reads frames from its input and writes what it has to say to ``said``."""
    from imageio_ffmpeg import get_ffmpeg_exe

    height, width = frame.shape[:2]
    words = [get_ffmpeg_exe(), "-y", "-f", "rawvideo", "-pix_fmt", "rgb24"]
    words += ["-s", f"{width}x{height}", "-r", str(fps), "-i", "-", "-an", *_OUTPUT, str(file)]
    # in a session of its own: Ctrl-C reaches this process alone, which then ends it
    return subprocess.Popen(
        words,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=said,
        start_new_session=True,
    )


# The name of a temporary file says nothing of its format. Constant quality; and the index first,
# so that browsers begin to play before they have all of it. Bit for bit the same each time: no
# threads. Colours are BT.601's, as ffmpeg converts them, and players are told.
_OUTPUT = ["-c:v", "libx264", "-pix_fmt", "yuv420p", "-v", "error"]
_OUTPUT += ["-f", "mp4", "-crf", "16", "-preset", "medium", "-movflags", "+faststart"]
_OUTPUT += ["-threads", "1", "-fflags", "+bitexact", "-flags:v", "+bitexact"]
_OUTPUT += ["-colorspace", "smpte170m", "-color_primaries", "smpte170m", "-color_trc", "smpte170m"]


def _write_gif(path: Path, frames: Iterable[Frame], fps: int) -> int:
    """Pillow keeps all frames of an animation; here each is written when it is there."""
    num = 0
    with written_beside(path) as temporary, temporary.open("wb") as file:
        for frame in frames:
            if num == 0:
                height, width = frame.shape[:2]
                size = width.to_bytes(2, "little") + height.to_bytes(2, "little")
                file.write(b"GIF89a" + size + b"\x70\x00\x00")
                file.write(b"\x21\xff\x0bNETSCAPE2.0\x03\x01\x00\x00\x00")
            # rounded so that the sum over all frames keeps to the clock
            ticks = round((num + 1) * _GIF_TICK / fps) - round(num * _GIF_TICK / fps)
            image = Image.fromarray(frame).quantize(256)
            for part in getdata(image, duration=10 * ticks, include_color_table=True):
                file.write(part)
            num += 1
        if not num:
            raise ValueError(f"{path}: a video of no frames")
        file.write(b";")
    return num


def enlarged(images: Frame, side: int) -> Frame:
    """Images (N, R, R, 3) uint8 at ``side`` pixels: whole factors unsmoothed, others bicubic."""
    own = images.shape[1]
    if own == side:
        return images
    if side % own == 0:
        return images.repeat(side // own, 1).repeat(side // own, 2)
    size, how = (side, side), Image.Resampling.BICUBIC
    return np.stack([np.asarray(Image.fromarray(one).resize(size, how)) for one in images])


def tiled(images: Frame, columns: int) -> Frame:
    """Images (N, S, S, 3) row by row as one frame (rows * S, columns * S, 3)."""
    rows = len(images) // columns
    side = images.shape[1]
    table = images.reshape(rows, columns, side, side, 3).transpose(0, 2, 1, 3, 4)
    return np.ascontiguousarray(table.reshape(rows * side, columns * side, 3))


def labelled(frame: Frame, text: str) -> Frame:
    """A frame with a line of text on white above it."""
    height = 16
    canvas = Image.new("RGB", (frame.shape[1], frame.shape[0] + height), "white")
    canvas.paste(Image.fromarray(frame), (0, height))
    draw: Any = ImageDraw.Draw(canvas)
    draw.text((2, 1), text, (40, 40, 40), ImageFont.load_default(11))
    return np.asarray(canvas)
