"""Photos and latents: ``dinogen project`` and ``video``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from launch.cli.results import Nimg, Source, Stage


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command()(project)


def project(
    run: Source,
    photos: Annotated[
        list[Path], typer.Argument(help="Photos, or folders of photos.", metavar="PHOTO...")
    ],
    space: Annotated[
        str | None,
        typer.Option(
            help="Latents to search: z, or w or w+ of stylegan2_ada; the closest by default.",
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
    """Find the latents of which a run's generator makes photos.

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
