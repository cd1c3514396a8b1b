"""Photos and latents: ``dinogen project`` and ``video``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from launch.cli.results import Nimg, Source, Stage


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command()(project)
    app.command()(video)


def project(
    run: Source,
    photos: Annotated[
        list[Path], typer.Argument(help="Photos, or folders of photos.", metavar="PHOTO...")
    ],
    space: Annotated[
        str | None,
        typer.Option(
            help="Latents to search: z, or w or w+ of StyleGAN2; the closest by default.",
            metavar="NAME",
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Steps of the search, 500 by default; for a VAE those after its encoder, none by "
            "default; for diffusion those of DDIM.",
        ),
    ] = None,
    restarts: Annotated[
        int, typer.Option(min=1, help="Searches in z, of which the best is kept.")
    ] = 4,
    loss: Annotated[
        str,
        typer.Option(
            help="lpips, guide, onet or pixels; auto: the first of them that is available.",
            metavar="NAME",
        ),
    ] = "auto",
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same latents.")] = 0,
    stage: Stage = None,
    nimg: Nimg = None,
    label: Annotated[
        int | None, typer.Option("--class", min=0, help="Class of the photos, 0 by default.")
    ] = None,
    align: Annotated[
        bool,
        typer.Option(
            "--align/--no-align",
            help="Cut photos out as the run's data were, or take the centred square of images "
            "that are crops already.",
        ),
    ] = True,
    out: Annotated[
        Path | None, typer.Option(help="Folder; RUN/projections by default.", metavar="DIR")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Project finished photos again.")
    ] = False,
    changes: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="Where data and weights are: data.path=FOLDER, metrics.lpips_backbone=FILE.",
            metavar="KEY=VALUE",
        ),
    ] = None,
) -> None:
    """Find the latents whose images come closest to photos.

    Each photo is cut out as the run's training images were. Its latents are searched by gradient
    descent, encoded (VAEs), or found by DDIM run backwards (diffusion). For each photo the folder
    holds projected.safetensors, an image of photo, crop, projection and difference, a video of the
    search, and results.json with the errors before and after; projections.html shows them all.
    Photos that cannot be used are named, and the others go on. The same command continues after an
    interruption.

    dinogen sample, look and video take the latents by --latents.

    [bold]Examples[/bold]

      dinogen project runs/stylegan2_ada_64 me.jpg you.jpg

      dinogen project runs/dcgan_64 photos --steps 1000 --restarts 8

      dinogen project runs/vae_64 crops --no-align --out projected
    """
    from dinogen.prepare.photos.find import counted
    from dinogen.projection.project import ProjectionRequest
    from dinogen.projection.project import project as project_photos
    from launch.cli.console import progress_bar, say, setup_logging

    setup_logging()
    request = ProjectionRequest(
        run,
        tuple(photos),
        space,
        steps,
        restarts,
        loss,
        seed,
        stage,
        nimg,
        label,
        align,
        out,
        overwrite,
        tuple(changes or ()),
    )
    with progress_bar("projecting", "steps/s") as move:
        found = project_photos(request, move, say)
    for one in found.done:
        before, after = one["before"]["mean_image"], one["after"]
        say(
            f"{one['name']}: rms {before['rms']:.1f} of the mean image -> {after['rms']:.1f}, "
            f"loss {before['loss']:.3f} -> {after['loss']:.3f}: {found.folder / one['name']}"
        )
    counts = [counted(len(found.done), "photo") + " projected"]
    counts += [f"{len(found.skipped)} finished before"] if found.skipped else []
    counts += [f"{len(found.rejected)} left out"] if found.rejected else []
    say(f"{', '.join(counts)}: {found.page}")
    if not found.done and not found.skipped:
        raise typer.Exit(2)


def video(
    run: Source,
    out: Annotated[
        Path | None,
        typer.Option(help="File, .mp4 or .gif; in RUN/videos by default.", metavar="FILE"),
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.05, max=3600, help="Length.")] = 8.0,
    fps: Annotated[int, typer.Option(min=1, max=120, help="Frames per second.")] = 30,
    grid: Annotated[
        str, typer.Option(help="Columns and rows of images.", metavar="COLSxROWS")
    ] = "1x1",
    size: Annotated[
        int | None,
        typer.Option(min=8, max=4096, help="Side of each image in pixels; the stage's by default."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same video.")] = 0,
    keys: Annotated[int, typer.Option(min=1, help="Latents that each image walks through.")] = 6,
    latents: Annotated[
        list[Path] | None,
        typer.Option(
            help="Walk from photo to photo: projected.safetensors of dinogen project, or a folder "
            "of them.",
            metavar="FILE",
        ),
    ] = None,
    space: Annotated[
        str | None,
        typer.Option(help="z on great circles, or w in straight lines; w if there is one."),
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(
            help="coarse or fine: only these layers walk, the others stay.", metavar="HALF"
        ),
    ] = None,
    psi: Annotated[
        float, typer.Option(min=0, max=1, help="Truncation: 0 is the mean image, 1 none.")
    ] = 1.0,
    label: Annotated[
        int | None, typer.Option("--class", min=0, help="Only images of this class.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Time steps that diffusion visits, by DDIM.")
    ] = None,
    loop: Annotated[
        bool, typer.Option("--loop/--no-loop", help="Lead back to the beginning, or not.")
    ] = True,
    stage: Stage = None,
    nimg: Nimg = None,
) -> None:
    """Write a walk through the latents of a run as a video.

    Each image of the grid walks through latents of the seed and back to its first. MP4 (H.264)
    takes pip install 'dinogen\\[video]'; GIF takes nothing.

    [bold]Examples[/bold]

      dinogen video runs/stylegan2_ada_64 --grid 4x2 --size 128 --psi 0.7

      dinogen video runs/stylegan2_ada_64 --layers fine --out styles.mp4

      dinogen video runs/dcgan_64 --seconds 4 --fps 15 --out walk.gif

      dinogen video runs/stylegan2_ada_64 --latents runs/stylegan2_ada_64/projections
    """
    import re

    from dinogen.errors import UserError
    from dinogen.visualize.video import VideoRequest, write_walk
    from launch.cli.console import progress_bar, say, setup_logging

    setup_logging()
    shape = re.fullmatch(r"([1-9]\d?)x([1-9]\d?)", grid)
    if shape is None:
        raise UserError(f"--grid {grid}: write COLSxROWS, such as 4x2; each is 1 to 99")
    request = VideoRequest(
        run,
        out,
        keys,
        seed,
        tuple(latents or ()),
        int(shape[1]),
        int(shape[2]),
        size,
        seconds,
        fps,
        space,
        layers,
        psi,
        label,
        steps,
        loop,
        stage,
        nimg,
    )
    with progress_bar("drawing", "frames/s") as move:
        path, num_frames = write_walk(request, move)
    say(f"{num_frames} frames at {fps} per second: {path}")
