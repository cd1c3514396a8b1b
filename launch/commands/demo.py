"""``dinogen demo``: photos to a trained generator in minutes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from dinogen.demo import Demo


def register(app: typer.Typer) -> None:
    """Add ``dinogen demo`` to the command line."""
    app.command("demo")(demo)


def demo(
    photos: Annotated[
        Path | None,
        typer.Option(
            help="Folder of your own photos; 101 built-in faces if left out.", metavar="DIR"
        ),
    ] = None,
    guide: Annotated[
        str | None,
        typer.Option(help="DINOv2 checkpoint: a folder or a hub name.", metavar="PATH"),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for all that it makes.", metavar="DIR")] = Path(
        "demo"
    ),
) -> None:
    """Turn photos into faces, pyramids and shards, and train 4x4, 8x8 and 16x16 on them.

    Works offline, on a CPU, in about four minutes. Without DINOv2's weights a smaller guide with
    random weights takes its place, and says so everywhere. Run again, it goes on where it was.

    [bold]Examples[/bold]

      dinogen demo

      dinogen demo --photos ~/Pictures --guide facebook/dinov2-small --out demo-mine
    """
    from dinogen.demo import run_demo
    from launch.logs import setup_logging

    setup_logging()
    _print(run_demo(out, photos, guide))


def _print(done: Demo) -> None:
    """Tell what was made, how long it took and what comes next."""
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    console.print()
    for result in done.results:
        name = f"{result['resolution']}x{result['resolution']}"
        verdict = result["verdict"]
        colour = "green" if verdict == "ok" else "red"
        console.print(
            f"{name:>7}  {result['nimg']:,} images  [{colour}]{verdict}[/]  "
            f"{done.config.run / name / result['files']['final']}"
        )
    steps = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in done.seconds.items())
    console.print(f"\nwall time {sum(done.seconds.values()):.0f} s: {steps}")
    if done.random_guide:
        console.print(
            "[bold red]RANDOM GUIDE[/]: the pictures show that all of it runs, not its quality"
        )
    if any(result["verdict"] != "ok" for result in done.results):
        console.print(
            "Collapse is what the objective mse leads to: all z end at one mean face "
            "(README.md, The collapse floor)"
        )
    console.print(f"\n[bold]Page[/]        {done.page}")
    console.print(f"[bold]TensorBoard[/] tensorboard --logdir {done.config.run}")
    console.print("[bold]Next[/]")
    run = done.config.run
    console.print(f"  dinogen sample {run} --num 64 --seed 1")
    console.print(f"  dinogen shards ls {done.config.data.path}")
    console.print("  dinogen demo --photos YOUR_PHOTOS --out demo-mine")
