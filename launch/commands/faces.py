"""``dinogen faces`` and ``dinogen download``: photos from a list, faces from photos."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from launch.bars import progress_bar

if TYPE_CHECKING:
    from dinogen.prepare.download import DownloadSummary
    from dinogen.prepare.faces import FacesSummary

_NUM_SHOWN = 10


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command()(faces)
    app.command()(download)


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
            "--withdraw", help="Remove the crops of photos that are gone, even if most are."
        ),
    ] = False,
) -> None:
    """Find the faces in photos and write them as aligned square images.

    Reads JPEG, PNG, WebP, TIFF, BMP and more below SRC. What is not used stands in
    OUT/rejected.csv with the reason; hidden and system files are passed over. The same command
    again goes on after an interruption, removes the crops of photos that were taken out of SRC and
    makes those of photos that were replaced again. Captions are read if the config has clip.

    [bold]Examples[/bold]

      dinogen faces photos faces

      dinogen faces photos faces_ffhq prepare.faces.align=ffhq prepare.faces.size=512

      dinogen faces party faces_all prepare.faces.which=all prepare.faces.min_face=40

      dinogen faces cats cats_256 prepare.faces.detect=none     (photos as they are)

    [bold]Options, with their defaults[/bold]  dinogen config show FILE
    """
    from dinogen import dist
    from dinogen.config import load_config, parse_config
    from dinogen.prepare.faces import write_faces
    from launch.logs import setup_logging

    setup_logging()
    if config is None:
        settings = parse_config({}, overrides or (), source="command line")
    else:
        settings = load_config(config, overrides or ())
    dist.set_cpu_threads()
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
    _tell_faces(summary, out)
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
        int, typer.Option(min=1, help="In a row without a new byte, then a file has failed.")
    ] = 5,
) -> None:
    """Fetch a list of photos: checked, retried, resumed after an interruption.

    What was not fetched stands in DIR/failed.csv with its line and the reason, and the exit code
    is 1; all else is fetched. The same command again tries what is missing once more.

    A photo whose address has no image suffix gets one by its content. A web page or an empty
    answer in place of a photo counts as failed.

    [bold]Examples[/bold]

      dinogen download urls.txt photos

      dinogen download urls.csv photos --num-parallel 16

    [bold]A text list[/bold], checksum and name may be left out; a tab before a name is never
    taken for a part of the address

      https://example.org/a.jpg

      https://example.org/b.jpg 9f86d081...(64 digits)...0f00a08 b2.jpg

    [bold]A table[/bold], with commas, semicolons, tabs or bars; other columns are passed over

      url;caption;filename

      https://example.org/photo?id=7;"a cat; asleep";cat
    """
    from dinogen.prepare.download import download as fetch
    from launch.logs import setup_logging

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
    _tell_download(summary, folder)
    if summary.failures:
        raise typer.Exit(1)


def _tell_faces(summary: FacesSummary, out: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    from dinogen.prepare.find import counted
    from dinogen.prepare.summary import account

    console = Console()
    table = Table(title=counted(summary.num_photos, "photo"), title_justify="left")
    table.add_column("outcome")
    table.add_column("number", justify="right")
    table.add_row("faces", str(summary.num_crops), style="green" if summary.num_crops else "red")
    for reason, number in summary.rejected.items():
        table.add_row(f"rejected: {reason}", str(number), style="yellow")
    table.add_row("photos done before", str(summary.num_skipped))
    console.print(table)
    for line in account(summary):
        console.print(line, soft_wrap=True, highlight=False, markup=False)
    if summary.rejected:
        console.print(f"why: {out / 'rejected.csv'}", soft_wrap=True, highlight=False)
    if summary.num_crops:
        console.print(
            f"next: dinogen pyramids {out} PYRAMIDS, or without a guide dinogen pack {out} DATA",
            soft_wrap=True,
            highlight=False,
        )
    else:
        console.print(
            "[bold red]NO FACE AT ALL.[/bold red] Look into rejected.csv; for photos that are "
            "of something else, or already cropped, use prepare.faces.detect=none."
        )


def _tell_download(summary: DownloadSummary, folder: Path) -> None:
    from rich.console import Console

    from dinogen.prepare.find import counted

    console = Console()
    console.print(
        f"{folder}: {summary.num_fetched} fetched ({summary.num_bytes / 1e6:.1f} MB), "
        f"{summary.num_present} there before, {len(summary.failures)} failed"
        + (f", {counted(summary.num_repeated, 'line')} repeated" if summary.num_repeated else ""),
        soft_wrap=True,
        highlight=False,
    )
    for failure in summary.failures[:_NUM_SHOWN]:
        line = f"  line {failure.line}: {failure.reason}: {failure.url}: {failure.detail}"
        console.print(line, style="red", soft_wrap=True, highlight=False, markup=False)
    if summary.failures:
        console.print(f"all of them: {folder / 'failed.csv'}", soft_wrap=True, highlight=False)
