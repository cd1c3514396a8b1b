"""``dinogen train``, ``sample`` and ``demo``."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from dinogen.demo import Demo


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command()(train)
    app.command()(sample)
    app.command()(demo)


def train(
    config: Annotated[Path, typer.Argument(help="YAML file of the run.", metavar="CONFIG")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes to the config.")
    ] = None,
    stage: Annotated[
        str | None,
        typer.Option(help="Train only stage R, or the stages from R to S: R..S.", metavar="R"),
    ] = None,
) -> None:
    """Train all stages of CONFIG, or some. The same command resumes an interrupted run.

    [bold]Examples[/bold]

      dinogen train configs/guided_256.yaml

      dinogen train configs/guided_256.yaml run=runs/b seed=1 stages.0.kimg=20

      dinogen train configs/guided_256.yaml --stage 16

      dinogen train configs/guided_256.yaml --stage 4..32

      dinogen launch configs/guided_256.yaml --gpus 4
    """
    from dinogen.config import load_config
    from dinogen.distributed import process_group
    from dinogen.runs.run import Run
    from dinogen.training.run import train as train_run
    from dinogen.training.stop import Stopped
    from launch.cli.console import say, setup_logging
    from launch.request import choose_stages

    setup_logging(quiet=not process_group.is_main())
    settings = load_config(config, overrides or ())
    try:
        results = train_run(settings, *choose_stages(settings, stage))
    except Stopped as stopped:
        if not process_group.under_agent():
            raise
        # torchrun would start a worker again that ends with another code than 0
        if process_group.is_main():
            say(f"dinogen: {stopped}", err=True)
        process_group.shutdown()
        return
    if process_group.is_main():
        run = Run.of(settings)
        for result in results:
            place = run.stage(result["resolution"])
            say(f"{place.name}: {place.folder / result['files']['final']}")
        say(f"page: {run.page}")
        say(f"curves: tensorboard --logdir {settings.run}")
    process_group.shutdown()


def sample(
    run: Annotated[
        Path,
        typer.Argument(
            help="Folder of a run, an exported file, or hf://user/name.", metavar="RUN|FILE"
        ),
    ],
    num: Annotated[int | None, typer.Option(min=1, help="Images to make; 64 by default.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same images.")] = 0,
    stage: Annotated[
        int | None, typer.Option(help="Resolution; the largest trained by default.", metavar="R")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder; RUN/samples/... by default.", metavar="DIR")
    ] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(help="What to show; several texts take turns over the images."),
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=100,
            help="Strength of --text, or of the classes of diffusion; more than 1 exaggerates.",
        ),
    ] = None,
    psi: Annotated[
        float, typer.Option(min=0, max=1, help="Truncation: 0 is the mean image, 1 none.")
    ] = 1.0,
    label: Annotated[
        int | None, typer.Option("--class", min=0, help="Only images of this class.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Time steps that diffusion visits.")
    ] = None,
    sampler: Annotated[
        str | None, typer.Option(help="Of diffusion: ddim or ddpm.", metavar="NAME")
    ] = None,
    watermark: Annotated[
        str | None, typer.Option(help="A text to write into each image, such as generated.")
    ] = None,
    latents: Annotated[
        list[Path] | None,
        typer.Option(
            help="Draw projected photos: projected.safetensors of dinogen project, or a folder of "
            "them.",
            metavar="FILE",
        ),
    ] = None,
    mix: Annotated[
        list[str] | None,
        typer.Option(
            help="With --latents: layers that read other latents, as in 4-9=seed:3 or 0-3=FILE.",
            metavar="LAYERS=SOURCE",
        ),
    ] = None,
) -> None:
    """Make images from the moving average of a run: PNGs and one grid.

    Each PNG says in its text dinogen which run, seed and command made it.

    [bold]Examples[/bold]

      dinogen sample runs/first --num 64 --seed 0 --stage 32

      dinogen sample first.safetensors --num 16 --watermark generated

      dinogen sample hf://user/faces --num 16

      dinogen sample runs/text --text "a smiling woman" --guidance 2

      dinogen sample runs/stylegan2_ada_64 --psi 0.7

      dinogen sample runs/ddpm_v_64 --steps 25 --sampler ddim

      dinogen sample runs/stylegan2_ada_64 --latents runs/stylegan2_ada_64/projections/me
    """
    from dinogen.errors import UserError
    from dinogen.visualize.samples import SampleRequest, write_samples
    from launch.cli.console import setup_logging

    setup_logging()
    given = {"steps": steps, "sampler": sampler, "guidance": guidance}
    sampling = {name: value for name, value in given.items() if value is not None}
    if latents:
        if sampling or text or label is not None or psi != 1 or num is not None or seed:
            raise UserError(
                "--latents: projected photos are drawn as they were projected: leave out --num, "
                "--seed, --text, --class, --psi, --steps, --sampler and --guidance"
            )
        from dinogen.visualize.latents import write_projections

        snapshot, drawn, grid = write_projections(run, latents, mix or (), stage, watermark, out)
        size = snapshot.place.name
        typer.echo(f"{drawn} projected photos of stage {size} at {snapshot.nimg} images: {grid}")
        return
    if mix:
        raise UserError("--mix: takes the projected photos of --latents: give them as well")
    if text and label is not None:
        raise UserError("--class: leave it out with --text")
    request = SampleRequest(
        run, num or 64, seed, stage, tuple(text or ()), psi, label, sampling, watermark
    )
    snapshot, grid = write_samples(request, out)
    size = snapshot.place.name
    typer.echo(f"{num} images of stage {size} at {snapshot.nimg} images: {grid}")


def demo(
    photos: Annotated[
        Path | None,
        typer.Option(
            help="Folder of your own photos; 101 built-in faces if left out.", metavar="DIR"
        ),
    ] = None,
    guide: Annotated[
        str | None,
        typer.Option(
            help="DINOv2 checkpoint in place of O-Net: a folder or a hub name. It takes hours on "
            "a CPU.",
            metavar="PATH",
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for its output.", metavar="DIR")] = Path("demo"),
) -> None:
    """Turn photos into faces, pyramids and shards, and train a generator up to 32x32 on them.

    Works offline, on two CPU cores, in about five minutes: the guide is the face detector's last
    network. A short run with the objective mse follows, for contrast. Run again, the demo goes on
    where it was.

    [bold]Examples[/bold]

      dinogen demo

      dinogen demo --photos ~/Photos --guide facebook/dinov2-small --out demo-mine
    """
    from dinogen.demo import run_demo
    from launch.cli.console import setup_logging

    setup_logging()
    _print(run_demo(out, photos, guide))


def _print(done: Demo) -> None:
    """Tell what was made, how long it took and what comes next."""
    from rich.console import Console

    from dinogen.runs.run import Run

    console = Console(highlight=False, soft_wrap=True)
    console.print()
    for result in done.results:
        place = Run.of(done.config).stage(result["resolution"])
        health = result["health"]
        colour = "green" if health == "ok" else "red"
        console.print(
            f"{place.name:>7}  {result['nimg']:,} images  [{colour}]{health}[/]  "
            f"{place.folder / result['files']['final']}"
        )
    last = done.contrast[-1]
    console.print(
        f"for contrast, mse: {last['nimg']:,} images, samples differ {last['diversity']:.0%} as "
        "much as real faces: [bold]that objective collapses[/] (docs/guided.md)"
    )
    steps = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in done.seconds.items())
    console.print(f"\nwall time {sum(done.seconds.values()):.0f} s: {steps}")
    console.print(f"\n[bold]Page[/]        {done.page}")
    folder = _folder_of_commands()
    console.print(f"[bold]TensorBoard[/] {folder}tensorboard --logdir {done.config.run}")
    console.print("[bold]Next[/]")
    run = done.config.run
    console.print(f"  {folder}dinogen sample {run} --num 64 --seed 1")
    console.print(f"  {folder}dinogen shards ls {done.config.data.path}")
    console.print(f"  {folder}dinogen demo --photos YOUR_PHOTOS --out demo-mine")


def _folder_of_commands() -> str:
    """What commands begin with where no environment is activated, as in the shell that ran make."""
    scripts = Path(sys.executable).parent
    if shutil.which("dinogen") == str(scripts / "dinogen"):
        return ""
    here = Path.cwd()
    return f"{scripts.relative_to(here) if scripts.is_relative_to(here) else scripts}/"
