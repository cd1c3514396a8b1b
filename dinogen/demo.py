"""The demo: from real photos to a trained generator in minutes, by the same steps as any run.

Then the objective ``mse`` from the same z: the page shows what the choice of objective does.
"""

from __future__ import annotations

import io
import logging
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dinogen.config import Config, GuideConfig, load_config
from dinogen.config.base import SHIPPED
from dinogen.distributed import process_group
from dinogen.errors import UserError
from dinogen.features import Guide, load_guide
from dinogen.files import write_bytes, write_json
from dinogen.prepare.photos.find import Photos, find_photos
from dinogen.report.run_page import Beside, write_page
from dinogen.runs.files import read_object

if TYPE_CHECKING:
    from PIL import Image

log = logging.getLogger(__name__)

CONFIG = SHIPPED / "demo.yaml"
NUM_FACES = 100
MIN_FACES = 2  # the fewest that can differ from each other
PHOTO_SIZE = 256  # of the face that the demo finds itself, so that it can be seen
# Half the images do for the run under mse: its samples agree long before. At the learning rate of
# drift it diverges.
CONTRAST = {
    "kimg": 1 / 2,
    "fade_kimg": 1 / 2,
    "warmup_kimg": 1 / 2,
    "decay_kimg": 1 / 2,
    "lr": 1 / 4,
}
_ASKED = "demo.json"


@dataclass
class Demo:
    """The result of a demo.

    Attributes:
        config: of the run.
        page: the demo's page.
        results: of the stages.
        contrast: of the stages under ``mse``.
        seconds: wall time of each step.
    """

    config: Config
    page: Path
    results: list[dict[str, Any]]
    contrast: list[dict[str, Any]]
    seconds: dict[str, float] = field(default_factory=dict)


def run_demo(
    out: Path,
    photos: Path | None = None,
    guide_path: str | None = None,
    config_file: Path | None = None,
) -> Demo:
    """Photos to faces, pyramids, shards and trained stages below ``out``, and a page of them.

    The same call again continues where it was.

    Args:
        out: folder for all files.
        photos: folder of photos; faces that come with scikit-image if None.
        guide_path: DINOv2 checkpoint folder or hub name; the config's guide if None.
        config_file: the run; configs/demo.yaml if None.

    Raises:
        UserError: ``out`` holds a demo of other photos or another guide; fewer than two faces were
            found; the requested guide is not available. If nothing was in ``out`` before,
            nothing is left there.
    """
    config_file = config_file or CONFIG
    from dinogen.training.run import train

    seconds: dict[str, float] = {}
    process_group.set_cpu_threads()
    with _nothing_left(out):
        config = _until_training(out, photos, guide_path, load_config(config_file), seconds)
    with _timed("train", seconds):
        results = train(config)
    log.info("demo: now the objective mse from the same z; it is known to collapse")
    contrast = _with_mse(config, out)
    with _timed("mse", seconds):
        under_mse = train(contrast)
    beside = Beside(contrast.run, "Under mse, the same z", _what_it_shows(results, under_mse))
    page = write_page(config.run, out / "index.html", beside)
    return Demo(config, page, results, under_mse, seconds)


def _until_training(
    out: Path,
    photos: Path | None,
    guide_path: str | None,
    config: Config,
    seconds: dict[str, float],
) -> Config:
    """Everything before training; returns the config."""
    _check_same(out, photos, guide_path)
    found = find_photos(photos) if photos else None
    if guide_path is not None:
        chosen = GuideConfig(name="dinov2", path=guide_path)
        config = config.model_copy(update={"guide": chosen})
    with _timed("guide", seconds):
        device = process_group.device()
        guide = load_guide(config.guide, device)
        guides = {name: load_guide(one, device) for name, one in config.guides.items()}
    write_json(out / _ASKED, _asked(photos, guide_path))
    data = config.data.model_copy(update={"path": str(out / "data")})
    config = config.model_copy(update={"run": out / "run", "data": data})
    if photos is None:
        with _timed("faces", seconds):
            photos = _builtin_faces(out, config)
        config = _without_detection(config)
    with _timed("prepare", seconds):
        _prepare(photos, found, config, guide, guides)
    return config


def _with_mse(config: Config, out: Path) -> Config:
    """The same run with the original objective, shorter and at a lower learning rate."""
    options = {**config.family.options, "objectives": [{"name": "mse", "normalize": True}]}
    stages = tuple(
        stage.model_copy(update={key: getattr(stage, key) * by for key, by in CONTRAST.items()})
        for stage in config.stages
    )
    family = type(config.family)(name=config.family.name, **options)
    return config.model_copy(update={"run": out / "run-mse", "family": family, "stages": stages})


def _what_it_shows(results: list[dict[str, Any]], under_mse: list[dict[str, Any]]) -> str:
    """The paragraph beside the images of both objectives."""
    last, contrast = results[-1], under_mse[-1]
    return (
        "Both runs have the same generator, z, frozen features and faces, and no discriminator. "
        "Under mse the learning rate is a quarter, for it diverges at that of drift. "
        "mse compares each generated image with one real face at random. Its best answer is the "
        "mean of all faces, so all z draw near one blurred face: after "
        f"{contrast['nimg']:,} images its samples differ {contrast['diversity']:.0%} as much as "
        "real faces do, and more training only brings them closer. drift compares whole sets: it "
        "moves generated features towards nearby real ones and away from each other. After "
        f"{last['nimg']:,} images its samples differ {last['diversity']:.0%} as much as real "
        "faces, in the features of the guide."
    )


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


def _without_detection(config: Config) -> Config:
    """The config for images that are aligned faces already."""
    faces = config.prepare.faces.model_copy(update={"detect": "none"})
    return config.model_copy(update={"prepare": config.prepare.model_copy(update={"faces": faces})})


def _builtin_faces(out: Path, config: Config) -> Path:
    """Faces that come with scikit-image: 100 aligned ones, and one found in a photo; mirrored too.

    Returns:
        The folder of all of them.
    """
    import numpy as np
    import skimage
    from PIL import Image

    from dinogen.prepare.faces.folder import write_faces

    source = Path(skimage.__file__).parent / "data"
    aligned = out / "aligned"
    faces = np.load(source / "lfw_subset.npy", allow_pickle=False)[:NUM_FACES]
    for number, face in enumerate(np.rint(faces * 255).astype(np.uint8)):
        _write_both_ways(Image.fromarray(face), aligned / f"lfw_{number:03d}.png")
    write_bytes(out / "photos" / "astronaut.png", (source / "astronaut.png").read_bytes())
    settings = config.prepare.faces.model_copy(update={"size": PHOTO_SIZE})
    summary = write_faces(out / "photos", out / "faces", settings)
    if summary.num_crops != 1:
        raise UserError(
            f"{out / 'photos'}: found {summary.num_crops} faces in astronaut.png instead of one: "
            f"see {out / 'faces' / 'rejected.csv'}; delete {out} and run again"
        )
    (crop,) = (out / "faces").glob(f"*.{settings.format}")
    with Image.open(crop) as face:
        _write_both_ways(face, aligned / "astronaut.png")
    return aligned


def _write_both_ways(face: Image.Image, file: Path) -> None:
    """Write a face as PNG, and its mirror image beside it."""
    from PIL import ImageOps

    for image, name in ((face, file.name), (ImageOps.mirror(face), f"{file.stem}_mirrored.png")):
        png = io.BytesIO()
        image.save(png, "PNG")
        write_bytes(file.with_name(name), png.getvalue())


def _prepare(
    photos: Path, found: Photos | None, config: Config, guide: Guide, guides: dict[str, Guide]
) -> None:
    """Pack the photos, unless that is done already."""
    from dinogen.prepare.pipeline import NoFaceError, in_words, prepare
    from dinogen.prepare.pyramid import PyramidMaker

    data = Path(config.data.path)
    if (data / "manifest.json").is_file():
        log.info("demo: %s is packed already", data)
        return
    maker = PyramidMaker(guide, config.prepare.pyramids, process_group.device(), guides)
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
