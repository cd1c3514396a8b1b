"""``dinogen shards``: list packed data, check it, rebuild what can be rebuilt."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="List packed data, check it, repair it.")

Location = Annotated[
    str, typer.Argument(help="Folder of a dataset, or its URL (s3://, gs://, ...).", metavar="DATA")
]
Folder = Annotated[
    Path, typer.Argument(help="Folder of a dataset.", metavar="DATA", exists=True, file_okay=False)
]
CacheDir = Annotated[
    Path | None, typer.Option(help="Where the shards of a URL are kept [~/.cache/dinogen/shards].")
]
CacheGb = Annotated[
    float | None,
    typer.Option(help="Size limit of that folder, in GB; the least recently used are evicted."),
]


def register(parent: typer.Typer) -> None:
    """Add ``dinogen shards`` to the command line."""
    parent.add_typer(app, name="shards", no_args_is_help=True)


@app.command("ls")
def ls(data: Location, cache_dir: CacheDir = None) -> None:
    """List splits, levels and shards, and where the features came from.

    [bold]Example[/bold]  dinogen shards ls data/faces
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from shards import open_dataset

    manifest = open_dataset(data, cache_dir=cache_dir).manifest
    console = Console()
    splits = Table("split", "samples", "shards", "MB", title=escape(printable(data)))
    for name, split in manifest.splits.items():
        num_bytes = sum(shard.num_bytes for shard in manifest.shards if shard.split == name)
        splits.add_row(
            name, f"{split.num_samples:,}", str(split.num_shards), f"{num_bytes / 1e6:,.1f}"
        )
    console.print(splits)
    levels = Table("level", "grid", "channels", "dtype", "collapse floor (total variance)")
    for name, level in manifest.levels.items():
        floor = "unknown" if level.total_variance is None else f"{level.total_variance:.6g}"
        levels.add_row(name, f"{level.grid}x{level.grid}", str(level.channels), level.dtype, floor)
    console.print(levels)
    shards = Table("shard", "samples", "MB", "sha256")
    for shard in manifest.shards:
        digest = shard.sha256[:16] if shard.sha256 else "never checked"
        shards.add_row(
            escape(printable(shard.name)),
            f"{shard.num_samples:,}",
            f"{shard.num_bytes / 1e6:,.1f}",
            digest,
        )
    console.print(shards)
    size = manifest.image_size
    console.print(f"images: {f'{size}x{size}' if size else 'never checked'}")
    names = f" ({', '.join(manifest.classes)})" if manifest.classes else ""
    labels = f"labels: {'yes' if manifest.has_labels else 'no'}{names}"
    console.print(printable(labels), markup=False)
    networks = [("guide", manifest.guide)]
    networks += [(f"guide {name}", facts) for name, facts in manifest.guides.items()]
    if manifest.clip:
        networks.append(("clip", manifest.clip))
    for title, facts in (*networks, ("prepare", manifest.prepare)):
        text = ", ".join(f"{key}={value}" for key, value in facts.items())
        console.print(printable(f"{title}: {text or 'not recorded'}"), markup=False)


@app.command()
def verify(data: Location, cache_dir: CacheDir = None, cache_gb: CacheGb = None) -> None:
    """Reread every byte and name each damaged shard and sample; exits with 1 if there are any.

    Nothing is written. Tars from elsewhere are checked as they are.

    [bold]Example[/bold]  dinogen shards verify data/faces
    """
    from rich.console import Console
    from rich.progress import Progress

    from shards import open_dataset
    from shards.check.verify import examine, examine_plain
    from shards.format.manifest import MANIFEST, PACKING

    folder = Path(data)
    plain = folder.is_dir() and not any((folder / name).exists() for name in (MANIFEST, PACKING))
    dataset = None if plain else open_dataset(data, cache_dir=cache_dir, cache_gb=cache_gb)
    shards = () if dataset is None else dataset.manifest.shards
    total = sum(shard.num_samples for shard in shards) if dataset is not None else None
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("samples", total=total)
        if dataset is None:
            found = examine_plain(folder, lambda count: bar.advance(task, count))
        else:
            found = examine(dataset, lambda count: bar.advance(task, count))
    for line in found.notes:
        typer.echo(printable(line))
    if not found.problems:
        samples, shard_count = (
            _count(found.num_samples, "sample"),
            _count(found.num_shards, "shard"),
        )
        typer.echo(f"{data}: {samples} in {shard_count}, sound")
        return
    for problem in found.problems:
        typer.echo(printable(str(problem)))
    typer.echo(f"{data}: {_count(len(found.problems), 'problem')}")
    raise typer.Exit(1)


@app.command("index")
def make_index(data: Folder) -> None:
    """Rebuild missing or wrong indexes; give plain WebDataset tars a manifest and statistics.

    A lost manifest.json is rebuilt as well; stats.safetensors still knows the guide. Tars are only
    read.

    [bold]Example[/bold]  dinogen shards index data/tars-from-elsewhere
    """
    from shards.check.repair import rebuild_indexes

    for line in rebuild_indexes(data) or ["all indexes fit their shards"]:
        typer.echo(printable(line))


@app.command()
def repair(
    data: Folder,
    yes: Annotated[
        bool, typer.Option("--yes", "-y", help="Do not ask, and drop samples that are lost.")
    ] = False,
) -> None:
    """Rewrite damaged shards without their damaged samples, and update manifest and indexes.

    It first lists which samples will be lost and why, and drops none without [bold]--yes[/bold].
    The original of each tar is kept beside it as NAME.tar.before-repair. If you have a sound copy,
    restore that instead.

    [bold]Example[/bold]  dinogen shards repair data/faces
    """
    from shards.check.repair import plan_repair

    plan = plan_repair(data)
    for line in plan.lines:
        typer.echo(printable(line))
    if plan.num_lost and not yes:
        typer.echo(
            f"{data}: nothing was changed: {_count(plan.num_lost, 'sample')} would be lost; add "
            "--yes to go on without (the originals are kept as NAME.tar.before-repair)",
            err=True,
        )
        raise typer.Exit(1)
    if plan.rewrites and not yes:
        typer.confirm(f"{data}: rewrite these tars? No sample is lost", abort=True)
    named = len(plan.unfit)
    for line in plan.run() or ([] if plan.unfit else ["nothing to repair"]):
        typer.echo(printable(line))
    if plan.unfit:
        # Tars on which the repair itself failed are not among the plan's lines.
        for line in plan.unfit[named:]:
            typer.echo(f"{printable(line)}; it is left as it is", err=True)
        until = (
            "statistics stay as they were"
            if (data / "manifest.json").exists()
            else "there is no manifest.json"
        )
        typer.echo(
            f"{data}: {_count(len(plan.unfit), 'tar')} NOT repaired, see above; {until} until "
            "these are fixed",
            err=True,
        )
        raise typer.Exit(1)


def _count(number: int, word: str) -> str:
    return f"{number:,} {word}" if number == 1 else f"{number:,} {word}s"


def printable(text: str) -> str:
    """Text as one line that is safe for any terminal: file names may hold any bytes."""
    from shards.errors import show_text

    return show_text(text)
