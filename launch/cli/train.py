"""``dinogen train``, ``sample`` and ``demo``."""

from __future__ import annotations

import hashlib
import re
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
    run: Annotated[Path, typer.Argument(help="Folder of a run.", metavar="RUN")],
    num: Annotated[int, typer.Option(min=1, help="Images to make.")] = 64,
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
        float,
        typer.Option(min=0, max=100, help="Strength of --text; more than 1 exaggerates."),
    ] = 1.0,
) -> None:
    """Make images from the moving average of a run: PNGs and one grid.

    [bold]Example[/bold]  dinogen sample runs/first --num 64 --seed 0 --stage 32
    [bold]Example[/bold]  dinogen sample runs/text --text "a smiling woman" --guidance 2
    """
    from PIL import Image

    from dinogen.errors import UserError
    from dinogen.files import write_text
    from dinogen.report.images import save_grid, to_uint8
    from dinogen.runs.layout import checkpoint_name
    from dinogen.training.checkpointing.snapshot import load_snapshot
    from launch.cli.console import setup_logging

    setup_logging()
    if guidance != 1 and not text:
        raise UserError("--guidance exaggerates what --text asks for: say that as well")
    snapshot = load_snapshot(run, stage)
    size = snapshot.place.name
    condition = snapshot.condition(text, guidance) if text else None
    asked = f"_{text_mark(text, guidance)}" if text else ""
    name = f"{size}_{checkpoint_name(snapshot.nimg)}_seed{seed}{asked}"
    folder = out or snapshot.place.run.samples_folder / name
    folder.mkdir(parents=True, exist_ok=True)
    if text:
        write_text(folder / "prompts.txt", "".join(f"{prompt}\n" for prompt in text))
    images = snapshot.sample(num, seed, condition).numpy()
    for number, image in enumerate(to_uint8(images)):
        Image.fromarray(image).save(folder / f"{number:05d}{snapshot.mark}.png")
    grid = save_grid(images, folder / f"grid_{size}{snapshot.mark}.png")
    typer.echo(f"{num} images of stage {size} at {snapshot.nimg} images: {grid}")


def text_mark(texts: list[str], guidance: float) -> str:
    """Part of a folder's name that tells other prompts from these."""
    words = re.sub(r"[^a-z0-9]+", "-", " ".join(texts).lower()).strip("-")[:40]
    digest = hashlib.sha256("\n".join(texts).encode()).hexdigest()[:8]
    return f"{words}_{digest}_g{guidance:g}"


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
