"""The demo: from real photos to a trained generator in minutes, by the same steps as any run."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dinogen.config import Config, GuideConfig, load_config
from dinogen.config.base import SHIPPED
from dinogen.distributed import process_group
from dinogen.errors import UserError
from dinogen.features import Guide, GuideError, load_guide
from dinogen.files import write_bytes, write_json
from dinogen.prepare.photos.find import Photos, find_photos
from dinogen.runs.files import read_object
from dinogen.runs.run import Run

log = logging.getLogger(__name__)

CONFIG = SHIPPED / "demo.yaml"
NUM_FACES = 100
MIN_FACES = 2  # the fewest that can differ from each other
# Faces of the built-in set are 25 pixels wide: more than 64 would only be blur.
BUILTIN_SIZE = 64
_ASKED = "demo.json"
RANDOM_SHAPE = {"hidden_size": 128, "num_layers": 3, "num_heads": 2}
# It costs a tenth of DINOv2-small, so more images fit into the same minutes.
RANDOM_KIMG = (7.68, 5.12, 3.072)
RANDOM_FADE_KIMG = (0.0, 1.536, 0.512)
# As they are initialised for training, the blocks hardly mix, and the last layer norm divides
# brightness away, since little besides the pixels enters a token. These factors correct both.
RANDOM_GAINS = {"embeddings.position_embeddings": 25.0, "encoder": 3.0}


@dataclass
class Demo:
    """The result of a demo.

    Attributes:
        config: of the run.
        page: the run's page.
        random_guide: whether the guide had random weights.
        results: of the stages.
        seconds: wall time of each step.
    """

    config: Config
    page: Path
    random_guide: bool
    results: list[dict[str, Any]]
    seconds: dict[str, float] = field(default_factory=dict)


def run_demo(
    out: Path,
    photos: Path | None = None,
    guide_path: str | None = None,
    config_file: Path | None = None,
) -> Demo:
    """Photos to faces, pyramids, shards and trained stages below ``out``.

    The same call again continues where it was.

    Args:
        out: folder for all files.
        photos: folder of photos; faces that come with scikit-image if None.
        guide_path: DINOv2 checkpoint folder or hub name. If None, the config's guide if its
            weights are available, else a smaller one with random weights, with a warning.
        config_file: the run; configs/demo.yaml if None.

    Raises:
        UserError: ``out`` holds a demo of other photos or another guide; fewer than two faces were
            found; the requested guide is not available. If nothing was in ``out`` before,
            nothing is left there.
    """
    config_file = config_file or CONFIG
    seconds: dict[str, float] = {}
    process_group.set_cpu_threads()
    config = load_config(config_file)
    with _nothing_left(out):
        config, random_guide = _until_training(out, photos, guide_path, config, seconds)
    with _timed("train", seconds):
        from dinogen.training.run import train

        results = train(config)
    return Demo(config, Run.of(config).page, random_guide, results, seconds)


def _until_training(
    out: Path,
    photos: Path | None,
    guide_path: str | None,
    config: Config,
    seconds: dict[str, float],
) -> tuple[Config, bool]:
    """Everything before training; returns the config, and whether the guide is random."""
    _check_same(out, photos, guide_path)
    found = find_photos(photos) if photos else None
    with _timed("guide", seconds):
        config, guide = _choose_guide(config, guide_path, out)
    write_json(out / _ASKED, _asked(photos, guide_path))
    mark = ".random-guide" if guide.info.random else ""
    data = config.data.model_copy(update={"path": str(out / f"data{mark}")})
    config = config.model_copy(update={"run": out / f"run{mark}", "data": data})
    if photos is None:
        with _timed("faces", seconds):
            photos = _builtin_faces(out, config)
        config = _without_detection(config)
    with _timed("prepare", seconds):
        _prepare(photos, found, config, guide)
    return config, guide.info.random


@contextmanager
def _nothing_left(out: Path) -> Iterator[None]:
    """Remove what a failing demo has written, so that the corrected command starts afresh.

    After an interruption nothing is removed: the same command continues there.
    """
    fresh = not out.exists() or (out.is_dir() and not any(out.iterdir()))
    try:
        yield
    except UserError:
        if fresh:
            shutil.rmtree(out, ignore_errors=True)
        raise


@contextmanager
def _timed(name: str, seconds: dict[str, float]) -> Iterator[None]:
    """Measure and log the wall time of a step."""
    began = time.monotonic()
    yield
    seconds[name] = time.monotonic() - began
    log.info("demo: %s took %.0f s", name, seconds[name])


def _asked(photos: Path | None, guide_path: str | None) -> dict[str, str | None]:
    """What must be the same in every call with the same folder."""
    return {"photos": str(photos.resolve()) if photos else None, "guide": guide_path}


def _check_same(out: Path, photos: Path | None, guide_path: str | None) -> None:
    """Refuse a folder that holds another demo."""
    found = read_object(out / _ASKED)
    if not found.there:
        return
    if found.value is None:
        raise UserError(f"{found.messages()[0]}: choose another folder with --out")
    before = found.value
    for name, value in _asked(photos, guide_path).items():
        if before.get(name) != value:
            raise UserError(
                f"{out}: holds a demo with {name} {before.get(name) or 'built in'}, not "
                f"{value or 'built in'}: choose another folder with --out, or delete this one"
            )
    log.info("demo: %s exists already and continues where it was", out)


def _choose_guide(config: Config, path: str | None, out: Path) -> tuple[Config, Guide]:
    """The requested guide; else the config's if it is available; else a random one."""
    from dinogen.features.checkpoint import weights_reachable

    chosen = config.guide
    if path is not None:
        chosen = chosen.model_copy(update={"path": path, "revision": None})
        return _with_guide(config, chosen), load_guide(chosen, process_group.device())
    if weights_reachable(chosen.path, chosen.revision):
        try:
            return config, load_guide(chosen, process_group.device())
        except GuideError as error:
            log.warning("%s", error)
    log.warning(
        "RANDOM GUIDE: the weights of %s are not available here, so a smaller network of the "
        "same kind with random weights is used instead. Everything runs, but the images say "
        "nothing about quality. With the weights: dinogen demo --guide FOLDER --out demo-dinov2",
        chosen.path,
    )
    folder = out / "random-guide"
    if not folder.is_dir():
        _make_random_guide(folder, config.seed)
    stages = tuple(
        stage.model_copy(update={"kimg": kimg, "fade_kimg": fade})
        for stage, kimg, fade in zip(config.stages, RANDOM_KIMG, RANDOM_FADE_KIMG, strict=True)
    )
    config = config.model_copy(update={"stages": stages})
    chosen = GuideConfig(name="dinov2", path=str(folder))
    return _with_guide(config, chosen), load_guide(chosen, process_group.device())


def _make_random_guide(folder: Path, seed: int) -> None:
    """Write a small DINOv2 with seeded random weights, whole or not at all."""
    from safetensors.torch import load_file, save_file

    from dinogen.features.dinov2 import make_random_dinov2

    partial = folder.with_name(f".{folder.name}.unscaled")
    shutil.rmtree(partial, ignore_errors=True)
    make_random_dinov2(partial, seed=seed, **RANDOM_SHAPE)
    weights = partial / "model.safetensors"
    tensors = load_file(weights)
    for prefix, gain in RANDOM_GAINS.items():
        for name, tensor in tensors.items():
            if name.startswith(prefix) and tensor.ndim > 1:
                tensor *= gain
    save_file(tensors, weights, metadata={"format": "pt"})
    partial.rename(folder)


def _with_guide(config: Config, guide: GuideConfig) -> Config:
    return config.model_copy(update={"guide": guide})


def _without_detection(config: Config) -> Config:
    """The config for images that are aligned faces already."""
    faces = config.prepare.faces.model_copy(update={"detect": "none", "size": BUILTIN_SIZE})
    return config.model_copy(update={"prepare": config.prepare.model_copy(update={"faces": faces})})


def _builtin_faces(out: Path, config: Config) -> Path:
    """Faces that come with scikit-image: 100 aligned ones, and one found in a photo.

    Returns:
        The folder of all of them.
    """
    import io

    import numpy as np
    import skimage
    from PIL import Image

    from dinogen.prepare.faces.folder import write_faces

    source = Path(skimage.__file__).parent / "data"
    aligned = out / "aligned"
    faces = np.load(source / "lfw_subset.npy", allow_pickle=False)[:NUM_FACES]
    for number, face in enumerate(np.rint(faces * 255).astype(np.uint8)):
        png = io.BytesIO()
        Image.fromarray(face).save(png, "PNG")
        write_bytes(aligned / f"lfw_{number:03d}.png", png.getvalue())
    write_bytes(out / "photos" / "astronaut.png", (source / "astronaut.png").read_bytes())
    summary = write_faces(out / "photos", out / "faces", config.prepare.faces)
    if summary.num_crops != 1:
        raise UserError(
            f"{out / 'photos'}: found {summary.num_crops} faces in astronaut.png instead of one: "
            f"see {out / 'faces' / 'rejected.csv'}; delete {out} and run again"
        )
    (crop,) = (out / "faces").glob(f"*.{config.prepare.faces.format}")
    write_bytes(aligned / crop.name, crop.read_bytes())
    return aligned


def _prepare(photos: Path, found: Photos | None, config: Config, guide: Guide) -> None:
    """Pack the photos, unless this guide has done so before."""
    from dinogen.prepare.pipeline import NoFaceError, in_words, prepare
    from dinogen.prepare.pyramid import PyramidMaker

    data = Path(config.data.path)
    if (data / "manifest.json").is_file():
        log.info("demo: %s is packed already", data)
        return
    maker = PyramidMaker(guide, config.prepare.pyramids, process_group.device())
    try:
        summary, manifest = prepare(photos, data, config.prepare, maker, photos=found)
    except NoFaceError as error:
        raise _too_few(photos, "no face", in_words(error.rejected)) from error
    rejected = in_words(summary.rejected)
    if summary.num_crops < MIN_FACES:
        shutil.rmtree(data)
        raise _too_few(photos, f"{summary.num_crops} face", rejected)
    log.info(
        "demo: %d faces of %d photos in %d shards (rejected: %s; see %s)",
        summary.num_crops,
        summary.num_photos,
        len(manifest.shards),
        rejected or "none",
        data / "rejected.csv",
    )


def _too_few(photos: Path, num_faces: str, rejected: str) -> UserError:
    reasons = f" (rejected: {rejected})" if rejected else ""
    return UserError(
        f"{photos}: {num_faces} found{reasons}, too few to train on: give photos of at least "
        f"{MIN_FACES} faces, better of {NUM_FACES}"
    )
