"""``dinogen download``, ``faces``, ``pyramids``, ``pack``, ``prepare``: from photos to shards."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from dinogen.errors import UserError
from launch.cli.console import Move, progress_bar

if TYPE_CHECKING:
    import torch

    from dinogen.config import Config, GuideConfig, LatentsConfig
    from dinogen.features import Guide
    from dinogen.prepare.download.download import DownloadSummary
    from dinogen.prepare.export_pt import PtFiles
    from dinogen.prepare.parts import PartFiles
    from dinogen.prepare.photos.summary import FacesSummary
    from dinogen.prepare.pyramid import PyramidMaker
    from shards.format.manifest import Manifest


T = TypeVar("T")

ConfigFile = Annotated[
    Path | None, typer.Option("--config", "-c", help="YAML file; defaults if left out.")
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes to the config.")
]
Repack = Annotated[
    bool,
    typer.Option(
        "--repack", help="Make the dataset in DATA again; it replaces the old one when complete."
    ),
]


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command()(prepare)
    app.command()(pyramids)
    app.command()(pack)
    app.command("export-pt")(export_pt)
    app.command()(faces)
    app.command()(download)


def prepare(
    src: Annotated[Path, typer.Argument(help="Folder of photos.", metavar="SRC")],
    data: Annotated[Path, typer.Argument(help="Folder of the dataset.", metavar="DATA")],
    overrides: Overrides = None,
    config: ConfigFile = None,
    repack: Repack = False,
) -> None:
    """Photos to shards in one pass: find faces, compute their features, pack both.

    Run the same command again to continue after an interruption. DATA/rejected.csv lists the
    photos that were not used, with the reason. On several GPUs run faces, pyramids and pack one
    after the other.

    If the family of the config reads no pyramids, none are made and no guide is needed.
    prepare.faces.detect=none uses photos of anything as they are; prepare.faces.classes=folders
    makes each folder below SRC a class.

    If the config has guides:, the features of each of them are computed as well; with clip: also
    its embeddings of images and captions, and with prepare.latents: the latents of an autoencoder.
    The caption of a photo NAME.jpg is NAME.txt beside it.

    If photos were removed, replaced or added since DATA was finished, the command says so;
    --repack makes the dataset again.

    [bold]Examples[/bold]

      dinogen prepare photos data/faces

      dinogen prepare photos data/faces -c my.yaml guide.path=facebook/dinov2-base

      dinogen prepare cats data/cats prepare.faces.detect=none prepare.pack.val_fraction=0.05

      dinogen prepare photos data/faces guides.pixels.name=pixels clip.path=clip-vit-base-patch32
    """
    from dinogen.prepare import pipeline
    from dinogen.prepare.photos.find import counted, find_photos
    from dinogen.prepare.photos.summary import account
    from dinogen.training.data import check_latents

    settings = _settings(config, overrides)
    photos = find_photos(src)  # a mistyped folder is reported before the guide is loaded
    maker = _maker(settings, _wants_pyramids(settings))
    made: list[str] = []
    if maker is not None and maker.latents is not None:
        maker.check_size(size := settings.prepare.faces.size)
        made = maker.latents.level_names(size)
    check_latents(settings, made)
    finished = _is_finished(data) and not repack

    def work(folder: Path) -> tuple[FacesSummary, Manifest]:
        with _bar("photos") as progress:
            return pipeline.prepare(
                src, folder, settings.prepare, maker, photos=photos, progress=progress
            )

    summary, manifest = _packed(data, repack, work)
    rejected = pipeline.in_words(summary.rejected)
    if finished:
        typer.echo("already finished")
    what = pipeline.noun(settings.prepare.faces)
    counts = f"{counted(summary.num_photos, 'photo')}, {counted(summary.num_crops, what)}"
    typer.echo(f"{counts}; {rejected or 'all used'}")
    for line in account(summary):
        typer.echo(line)
    if rejected:
        typer.echo(f"reasons: {data / 'rejected.csv'}")
    _report(data, manifest)


def pyramids(
    faces: Annotated[Path, typer.Argument(help="Folder of aligned faces.", metavar="FACES")],
    out: Annotated[Path, typer.Argument(help="Folder of the pyramids.", metavar="OUT")],
    overrides: Overrides = None,
    config: ConfigFile = None,
) -> None:
    """Compute the guides' features of aligned faces, at grids 4, 8 and 16.

    Run the same command again to continue after an interruption. Under torchrun the processes
    share the work.

    [bold]Examples[/bold]

      dinogen pyramids faces pyramids -c my.yaml

      python -m launch.local.torchrun --standalone --nproc-per-node 8 -m launch.cli \\
        pyramids faces pyramids -c my.yaml
    """
    from dinogen.distributed import process_group
    from dinogen.distributed.failure import failure_propagation
    from dinogen.prepare.parts import write_pyramids
    from dinogen.prepare.photos.find import counted

    settings = _settings(config, overrides)
    process_group.init()
    bar = _bar("faces" if process_group.world_size() == 1 else "faces of rank 0")
    with failure_propagation(), bar as progress:
        # The user asked for pyramids, unless it is only for embeddings or latents.
        plain = settings.clip is None and settings.prepare.latents is None
        maker = _maker(settings, plain or _wants_pyramids(settings))
        assert maker is not None
        summary = write_pyramids(faces, out, maker, progress=progress)
    if process_group.is_main():
        typer.echo(
            f"{out}: {counted(summary.num_parts, 'part')} of {maker.label}; this process wrote "
            f"{summary.num_done} and kept {summary.num_kept}"
        )
        typer.echo(f"next: dinogen pack {faces} {out} DATA")
    process_group.shutdown()


def pack(
    faces: Annotated[Path, typer.Argument(help="Folder of aligned faces.", metavar="FACES")],
    folders: Annotated[
        list[str],
        typer.Argument(
            help="Their pyramids, if there are any: parts, or one .pt per face. Then the folder of "
            "the dataset, and changes to the config.",
            metavar="[PYRAMIDS] DATA [KEY=VALUE]...",
        ),
    ],
    config: ConfigFile = None,
    repack: Repack = False,
) -> None:
    """Join faces and their pyramids and pack them as tar shards with an index and a manifest.

    Run the same command again to continue after an interruption. Families that read no pyramids
    need none. Damaged images of a plain folder and damaged .pt files are listed in
    DATA/rejected.csv; the rest is packed. If faces have changed since DATA was finished, the
    command says so; --repack makes the dataset again.

    [bold]Examples[/bold]

      dinogen pack faces pyramids data/faces prepare.pack.val_fraction=0.05

      dinogen pack faces old_experiment/pt data/faces guide.path=facebook/dinov2-base

      dinogen pack faces data/plain
    """
    from dinogen.prepare import join

    pyramids, data, overrides = _folders(folders)
    settings = _settings(config, overrides)
    if pyramids is None and config is not None and _wants_pyramids(settings):
        raise UserError(
            "the family of the config reads pyramids: write dinogen pack FACES PYRAMIDS DATA, or "
            "add prepare.pyramids.make=never"
        )
    if pyramids is None and settings.clip is not None:
        raise UserError(
            "the config has clip, whose embeddings dinogen pyramids computes: write dinogen pack "
            "FACES PYRAMIDS DATA, or add clip=null"
        )
    if pyramids is None and settings.prepare.latents is not None:
        raise UserError(
            "the config has prepare.latents, which dinogen pyramids computes: write dinogen pack "
            "FACES PYRAMIDS DATA, or add prepare.latents=null"
        )
    source = join.open_pyramids(pyramids) if pyramids is not None else None
    if source is not None and settings.prepare.latents is not None:
        _check_latents_in(source, settings.prepare.latents)
    named = config is not None or any(item.startswith("guide.") for item in overrides)
    guide = join.guide_of(source, settings.guide if named else None) if source else {}
    finished = _is_finished(data) and not repack

    def work(folder: Path) -> Manifest:
        with _bar("faces") as progress:
            return join.pack_faces(
                faces,
                source,
                folder,
                settings.prepare.pack,
                guide,
                by_folder=settings.prepare.faces.classes == "folders",
                progress=progress,
            )

    manifest = _packed(data, repack, work)
    if finished:
        typer.echo("already finished")
    _report(data, manifest)


def export_pt(
    data: Annotated[Path, typer.Argument(help="Packed dataset.", metavar="DATA")],
    out: Annotated[Path, typer.Argument(help="Folder of the .pt files.", metavar="DIR")],
) -> None:
    """Write one .pt per image: {'4x4': (1, 16, C), '8x8': ..., '16x16': ...} float32.

    dinogen pack reads such a folder back. Damaged samples are named and all others are written;
    the exit code is then 1.

    [bold]Example[/bold]  dinogen export-pt data/faces pt
    """
    from dinogen.prepare import export_pt as exporter
    from dinogen.prepare.photos.find import counted
    from launch.cli.console import setup_logging

    setup_logging()
    with _bar("samples") as progress:
        num_files = exporter.export_pt(data, out, progress=progress)
    typer.echo(f"{counted(num_files, 'file')}: {out}")


def _folders(words: list[str]) -> tuple[Path | None, Path, list[str]]:
    """Pyramids, dataset and overrides from ``[PYRAMIDS] DATA [KEY=VALUE]...``.

    Raises:
        UserError: too many folders, or a folder of pyramids in the place of the dataset.
    """
    paths = [Path(word) for word in words if "=" not in word]
    if len(paths) not in (1, 2):
        raise UserError("write dinogen pack FACES [PYRAMIDS] DATA [KEY=VALUE]...")
    data = paths[-1]
    if any(data.glob("part-*.safetensors")) or any(data.glob("[!.]*.pt")):
        raise UserError(f"{data} holds pyramids: add the folder of the dataset after it")
    return (paths[0] if len(paths) == 2 else None), data, [word for word in words if "=" in word]


def _check_latents_in(pyramids: PartFiles | PtFiles, config: LatentsConfig) -> None:
    """Refuse pyramids without the latents that a config asks for.

    Raises:
        UserError: naming the key.
    """
    from shards.format.sample import OF_LATENTS

    for name, wanted in zip(OF_LATENTS, (True, config.flips), strict=True):
        if wanted and name not in pyramids.guides:
            raise UserError(
                f"{pyramids.folder}: holds no {name}.*, and the config has prepare.latents"
                f"{'' if name == OF_LATENTS[0] else '.flips'}: run dinogen pyramids with this "
                "config into a new folder, or add prepare.latents=null"
            )


def _wants_pyramids(settings: Config) -> bool:
    """Whether pyramids are made for the data; prints a line if not."""
    from dinogen.training.data import makes_pyramids

    wanted = makes_pyramids(settings)
    if not wanted and settings.prepare.pyramids.make == "auto":
        typer.echo(
            f"no pyramids: family {settings.family.name} reads none "
            "(prepare.pyramids.make=always makes them)"
        )
    return wanted


def _settings(config: Path | None, overrides: list[str] | None) -> Config:
    from dinogen.config import load_config, parse_config
    from dinogen.distributed import process_group
    from launch.cli.console import setup_logging

    setup_logging(quiet=not process_group.is_main())
    if config is None:
        return parse_config({}, overrides or (), source="command line")
    return load_config(config, overrides or ())


def _maker(settings: Config, pyramids: bool) -> PyramidMaker | None:
    """What makes the features of the config; None if it needs none."""
    from dinogen.distributed import process_group
    from dinogen.prepare.pyramid import PyramidMaker

    wanted = settings.prepare.latents
    if not pyramids and settings.clip is None and wanted is None:
        return None
    process_group.set_cpu_threads()
    device = process_group.device()
    guide: Guide | None = None
    guides: dict[str, Guide] = {}
    if pyramids:
        guide = _guide("guide", settings.guide, device)
        guides = {n: _guide(f"guides.{n}", one, device) for n, one in settings.guides.items()}
    embedder = None
    if settings.clip is not None:
        from dinogen.features.clip import load_clip

        embedder = load_clip(settings.clip, device)
    latents = None
    if wanted is not None:
        from dinogen.prepare.latents import LatentMaker

        latents = LatentMaker.load(wanted, device)
    return PyramidMaker(guide, settings.prepare.pyramids, device, guides, embedder, latents)


def _guide(key: str, config: GuideConfig, device: torch.device) -> Guide:
    from dinogen.features import GuideError, load_guide

    try:
        return load_guide(config, device)
    except GuideError as error:
        raise GuideError(
            f"{str(error).replace('guide.', f'{key}.')}\nA family that reads no pyramids needs no "
            "guide: pass its config with -c, or add prepare.pyramids.make=never"
        ) from None


def _packed(data: Path, again: bool, work: Callable[[Path], T]) -> T:
    """Pack into a folder, or into one that replaces it when it is finished."""
    from dinogen.prepare.earlier import repack, warn_of_interrupted

    if again:
        return repack(data, work)
    warn_of_interrupted(data)
    return work(data)


def _is_finished(data: Path) -> bool:
    """Whether there is a finished dataset; work on it then returns at once, or fails."""
    from shards.format.manifest import MANIFEST

    return (data / MANIFEST).is_file()


def _report(data: Path, manifest: Manifest) -> None:
    from dinogen.prepare.photos.find import counted

    splits = ", ".join(f"{info.num_samples} {name}" for name, info in manifest.splits.items())
    typer.echo(f"{data}: {splits} in {counted(len(manifest.shards), 'shard')}")
    for name, level in manifest.levels.items():
        channels = counted(level.channels, "channel")
        typer.echo(f"  {name}: {channels}, total variance {level.total_variance:.4g}")
    typer.echo(f"next: dinogen train CONFIG data.path={data}")


def _bar(what: str) -> AbstractContextManager[Move]:
    from dinogen.distributed import process_group

    return progress_bar(what, "images/s", show=process_group.is_main())


_NUM_SHOWN = 10


def faces(
    src: Annotated[Path, typer.Argument(help="Folder of photos.", metavar="SRC")],
    out: Annotated[Path, typer.Argument(help="Folder for the faces.", metavar="OUT")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes to the config.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="YAML file; defaults if left out.")
    ] = None,
    device: Annotated[
        str, typer.Option(help="Where faces are detected: auto, cpu, cuda:1, ...")
    ] = "auto",
    withdraw: Annotated[
        bool,
        typer.Option(
            "--withdraw", help="Remove the crops of photos that are gone, even if most are gone."
        ),
    ] = False,
) -> None:
    """Find the faces in photos and write them as aligned square images.

    Reads JPEG, PNG, WebP, TIFF, BMP and more below SRC. OUT/rejected.csv lists what is not used,
    with the reason; hidden and system files are skipped. Run the same command again to continue
    after an interruption, to remove the crops of photos that were removed from SRC, and to make
    those of replaced photos again. Captions are read if the config has clip.

    [bold]Examples[/bold]

      dinogen faces photos faces

      dinogen faces photos faces_ffhq prepare.faces.align=ffhq prepare.faces.size=512

      dinogen faces party faces_all prepare.faces.which=all prepare.faces.min_face=40

      dinogen faces cats cats_256 prepare.faces.detect=none     (photos as they are)

    [bold]All options with their values[/bold]  dinogen config show FILE
    """
    from dinogen.config import load_config, parse_config
    from dinogen.distributed import process_group
    from dinogen.prepare.faces.folder import write_faces
    from launch.cli.console import setup_logging

    setup_logging()
    if config is None:
        settings = parse_config({}, overrides or (), source="command line")
    else:
        settings = load_config(config, overrides or ())
    process_group.set_cpu_threads()
    with progress_bar("faces", "photos/s") as move:
        summary = write_faces(
            src,
            out,
            settings.prepare.faces,
            with_captions=settings.clip is not None,
            withdraw=withdraw,
            device=device,
            progress=move,
        )
    _report_faces(summary, out)
    if not summary.num_crops:
        raise typer.Exit(1)


def download(
    listing: Annotated[
        Path,
        typer.Argument(help="Lines of URL [SHA256] [FILENAME], or CSV or TSV.", metavar="LIST"),
    ],
    folder: Annotated[Path, typer.Argument(help="Folder for the files.", metavar="DIR")],
    num_parallel: Annotated[
        int, typer.Option(min=1, max=64, help="Files fetched at the same time.")
    ] = 8,
    num_attempts: Annotated[
        int, typer.Option(min=1, help="Tries in a row without a new byte until a file has failed.")
    ] = 5,
) -> None:
    """Fetch a list of photos: checked, retried, resumed after an interruption.

    DIR/failed.csv lists what was not fetched, with its line and the reason, and the exit code is
    then 1; all others are fetched. Run the same command again to retry what is missing.

    A photo whose address has no image suffix gets one from its content. A web page or an empty
    answer instead of a photo counts as failed.

    [bold]Examples[/bold]

      dinogen download urls.txt photos

      dinogen download urls.csv photos --num-parallel 16

    [bold]A text list[/bold]: checksum and name are optional; a tab always ends the address

      https://example.org/a.jpg

      https://example.org/b.jpg 9f86d081...(64 digits)...0f00a08 b2.jpg

    [bold]A table[/bold] with commas, semicolons, tabs or bars; other columns are ignored

      url;caption;filename

      https://example.org/photo?id=7;"a cat; asleep";cat
    """
    from dinogen.prepare.download.download import download as fetch
    from launch.cli.console import setup_logging

    setup_logging()
    with progress_bar("download", "MB") as move:

        def progress(num_done: int, total: int, num_bytes: int) -> None:
            move(num_done, total, f"{num_bytes / 1e6:.1f}")

        summary = fetch(
            listing,
            folder,
            num_parallel=num_parallel,
            num_attempts=num_attempts,
            progress=progress,
        )
    _report_download(summary, folder)
    if summary.failures:
        raise typer.Exit(1)


def _report_faces(summary: FacesSummary, out: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    from dinogen.prepare.photos.find import counted
    from dinogen.prepare.photos.summary import account

    console = Console()
    table = Table(title=counted(summary.num_photos, "photo"), title_justify="left")
    table.add_column("outcome")
    table.add_column("number", justify="right")
    table.add_row("faces", str(summary.num_crops), style="green" if summary.num_crops else "red")
    for reason, number in summary.rejected.items():
        table.add_row(f"rejected: {reason}", str(number), style="yellow")
    table.add_row("photos already done", str(summary.num_skipped))
    console.print(table)
    for line in account(summary):
        console.print(line, soft_wrap=True, highlight=False, markup=False)
    if summary.rejected:
        console.print(f"reasons: {out / 'rejected.csv'}", soft_wrap=True, highlight=False)
    if summary.num_crops:
        console.print(
            f"next: dinogen pyramids {out} PYRAMIDS, or without a guide dinogen pack {out} DATA",
            soft_wrap=True,
            highlight=False,
        )
    else:
        console.print(
            "[bold red]NO FACE WAS FOUND.[/bold red] See rejected.csv; for photos of something "
            "else, or that are already cropped, use prepare.faces.detect=none."
        )


def _report_download(summary: DownloadSummary, folder: Path) -> None:
    from rich.console import Console

    from dinogen.prepare.photos.find import counted

    console = Console()
    console.print(
        f"{folder}: {summary.num_fetched} fetched ({summary.num_bytes / 1e6:.1f} MB), "
        f"{summary.num_present} already there, {len(summary.failures)} failed"
        + (f", {counted(summary.num_repeated, 'line')} repeated" if summary.num_repeated else ""),
        soft_wrap=True,
        highlight=False,
    )
    for failure in summary.failures[:_NUM_SHOWN]:
        line = f"  line {failure.line}: {failure.reason}: {failure.url}: {failure.detail}"
        console.print(line, style="red", soft_wrap=True, highlight=False, markup=False)
    if summary.failures:
        console.print(f"all of them: {folder / 'failed.csv'}", soft_wrap=True, highlight=False)
