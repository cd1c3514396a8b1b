"""What comes of a run: ``dinogen evaluate``, ``look``, ``compare`` and ``serve``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

Run = Annotated[Path, typer.Argument(help="Folder of a run.", metavar="RUN")]
Source = Annotated[
    Path,
    typer.Argument(
        help="Folder of a run, an exported file, or hf://user/name.", metavar="RUN|FILE"
    ),
]
Stage = Annotated[
    int | None, typer.Option(help="Resolution; the largest trained by default.", metavar="R")
]

Nimg = Annotated[
    int | None,
    typer.Option(min=0, help="Checkpoint, by its images seen; the newest by default."),
]


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    for command in (evaluate, look, compare, serve):
        app.command()(command)


def evaluate(
    place: Annotated[
        Path,
        typer.Argument(
            help="Folder of a run, one of its checkpoints, an exported file, hf://user/name, or "
            "any folder of images.",
            metavar="RUN|FILE|FOLDER",
        ),
    ],
    changes: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...",
            help="Changes to the section metrics:, and new paths: data.path=FOLDER, "
            "guide.path=FOLDER.",
        ),
    ] = None,
    metrics: Annotated[
        str | None,
        typer.Option(
            help="Names, separated by commas; all by default. held_out is what the family itself "
            "measures.",
            metavar="fid,kid",
        ),
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(
            help="Real images to compare with: packed shards or a folder; the run's own data by "
            "default.",
            metavar="DATA",
        ),
    ] = None,
    stage: Stage = None,
    nimg: Nimg = None,
    split: Annotated[
        str | None,
        typer.Option(
            help="Which part of the data to measure on: val (the default), test or train.",
            metavar="SPLIT",
        ),
    ] = None,
    # not --num: torchrun takes that for the beginning of an option of its own
    num_samples: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Number of images to generate, or to read from a folder, and limit of the "
            "held-out samples; metrics.num_samples and all by default.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="File (.json) or folder to write to; default: next to what is measured.",
            metavar="FILE|FOLDER",
        ),
    ] = None,
    all_checkpoints: Annotated[
        bool,
        typer.Option(
            "--all-checkpoints",
            help="Measure --metrics at every kept checkpoint of a stage, for curves in compare.",
        ),
    ] = False,
) -> None:
    """Measure a checkpoint, or a folder of images, against real ones.

    For a run it measures what its family measures on held-out samples, and metrics of generated
    images such as FID (docs/metrics.md). Only what the metrics need is loaded. A metric whose
    weights, data or guide are missing is reported with the reason, and all others are measured.
    Each metric value is printed as soon as it is known; the exit code is 1 if there is none. Under
    torchrun the work is shared among the ranks; the metric values stay the same.

    [bold]Examples[/bold]

      dinogen evaluate runs/first

      dinogen evaluate runs/first --metrics fid768,kid768 metrics.inception768=folded.safetensors

      dinogen evaluate moved/first data.path=/mnt/faces --out first.json

      dinogen evaluate images --reference data/faces --metrics fid,precision,recall

      dinogen evaluate runs/first --metrics fid --all-checkpoints

      python -m launch.local.torchrun --standalone --nproc-per-node 4 -m launch.cli \\
        evaluate runs/first
    """
    from dinogen.distributed import process_group
    from dinogen.errors import UserError
    from dinogen.evaluation.evaluate import evaluate as evaluate_run
    from dinogen.evaluation.evaluate import evaluate_folder, is_folder_of_images
    from dinogen.evaluation.record import find_path
    from dinogen.files import named_folder
    from dinogen.hub import working_path
    from dinogen.runs.layout import is_exported, parse_checkpoint
    from dinogen.runs.run import Run
    from dinogen.training.checkpointing.exported import results_folder
    from launch.cli.console import say, setup_logging

    setup_logging(quiet=not process_group.is_main())

    def tell(part: dict[str, Any]) -> None:
        for line in lines_of(part):
            say(line)  # at once, also into a pipe: what follows may take long, or fail

    place = named_folder(working_path(place))
    if all_checkpoints:
        if is_exported(place):
            raise UserError(f"--all-checkpoints: {place} is an exported file: give the run")
        if nimg is not None or out is not None:
            raise UserError(
                "--all-checkpoints: measures each of them, into the run: leave out --nimg and --out"
            )
        options = {"--reference": reference, "--split": split, "--num-samples": num_samples}
        words = [str(one) for pair in options.items() if pair[1] is not None for one in pair]
        _measure_all(place, metrics, [*words, *(changes or ())], stage)
        return
    names = [name.strip() for name in (metrics or "").split(",") if name.strip()]
    request: dict[str, Any] = {"names": names, "reference": reference, "changes": changes or ()}
    request |= {"out": out, "tell": tell}
    if is_folder_of_images(place):
        result = evaluate_folder(place, num_samples, split=split, **request)
        written = find_path(place, out)
    else:
        if (checkpoint := parse_checkpoint(place)) is not None:
            place, stage, nimg = checkpoint
        result = evaluate_run(place, stage, split, num_samples, nimg=nimg, **request)
        folder = results_folder(place) if is_exported(place) else place
        written = find_path(Run(folder).stage(result["resolution"]).folder, out)
    if process_group.is_main():
        for line in closing_lines(result):
            say(line)
        say(str(written) if result["kept"] else f"NOT KEPT: {written} cannot be written")
    process_group.shutdown()
    if not measured_now(result):
        typer.echo("dinogen: nothing was measured", err=True)
        raise typer.Exit(1)


def _measure_all(run: Path, metrics: str | None, words: list[str], size: int | None) -> None:
    """Measure every kept checkpoint of a stage; exits with 1 if one of them fails."""
    from dinogen.distributed import process_group
    from dinogen.errors import UserError
    from launch.compare import sweep_checkpoints

    if metrics is None:
        raise UserError("--all-checkpoints: name what is measured: --metrics fid")
    if process_group.under_agent():
        raise UserError("--all-checkpoints: starts a process for each: run it without torchrun")
    swept = sweep_checkpoints(run, metrics, words, size)
    if swept is None:
        raise UserError(f"{run}: no stage is trained to its end: name one with --stage")
    for problem in swept.problems:
        typer.echo(problem, err=True)
    typer.echo(f"{swept.num_lines} checkpoints: {swept.path}")
    if swept.problems:
        raise typer.Exit(1)


HELD_OUT = "held_out"


def lines_of(part: dict[str, Any]) -> Iterator[str]:
    """Readable lines for a part of an evaluation.json, as it becomes known.

    Args:
        part: what the checkpoint or folder is, or metric values that were just measured.
    """
    if "resolution" in part:
        yield _title(part)
        yield from _own(part)
    for name, metric_value in (part.get("measured") or {}).items():
        if metric_value["value"] is not None:
            yield f"  {_metric_value(name, metric_value, part.get('fingerprints') or {})}"


def closing_lines(result: dict[str, Any]) -> Iterator[str]:
    """Lines for the end of an evaluation: values measured before, and metrics not available.

    Args:
        result: a whole evaluation.json.
    """
    from dinogen.metrics.registry import GUIDE_DIVERSITY

    before = set(result.get("measured_before") or ())
    prints = result.get("fingerprints") or {}
    measured = result["measured"]
    if HELD_OUT in before:
        # after a probe for guide_diversity alone, everything else is already printed
        probed = GUIDE_DIVERSITY in measured and GUIDE_DIVERSITY not in before
        for line in _own(result):
            if not probed or line.startswith(f"  {HELD_OUT}/"):
                yield f"{line} (measured before)"
    for name, metric_value in measured.items():
        if name in before and metric_value["value"] is not None:
            said = _metric_value(name, metric_value, prints)
            yield f"  {said} (measured before: {metric_value.get('command')})"
    missing: dict[str, list[str]] = {}
    for name, reason in (result.get("not_measured") or {}).items():
        missing.setdefault(reason, []).append(name)
    for name, metric_value in measured.items():
        if metric_value["value"] is None and name not in before:
            missing.setdefault(metric_value["reason"], []).append(name)
    for reason, names in missing.items():
        yield f"  not available: {', '.join(names)}: {reason}"


def measured_now(result: dict[str, Any]) -> list[str]:
    """Names of what this command has measured, including ``held_out``."""
    before = set(result.get("measured_before") or ())
    found = [name for name, one in result["measured"].items() if one["value"] is not None]
    if result.get("metrics"):
        found.append(HELD_OUT)
    return [name for name in found if name not in before]


def _title(result: dict[str, Any]) -> str:
    from dinogen.runs.layout import stage_name

    size = stage_name(result["resolution"])
    if "nimg" not in result:
        return f"{result['num_samples']} images of {size} in {result['folder']}"
    taught = result.get("guide_label")
    said = f"stage {size} at {result['nimg']} images"
    if result.get("num_samples"):
        said += f", {result['num_samples']} samples of {result['split']}"
    return said + (f", guide: {taught}" if taught else "")


def _own(result: dict[str, Any]) -> Iterator[str]:
    """Lines for what the family itself measures."""
    from dinogen.runs.values import FEW

    num = result.get("num_samples") or 0
    for name, value in (result.get("metrics") or {}).items():
        few = name.startswith("held_out/") and num < FEW
        caution = f" (CAUTION: from only {num:,} held-out samples)" if few else ""
        yield f"  {name}: {'not finite' if value is None else f'{value:.6g}'}{caution}"
    if "health" in result:
        yield f"  {' '.join(result.get('warnings') or ()) or result['health']}"
    if result.get("num_skipped"):
        yield f"  {result['num_skipped']} damaged samples were skipped"


def _metric_value(name: str, metric_value: dict[str, Any], fingerprints: dict[str, Any]) -> str:
    """``fid: 12.3 +- 0.4 (5000 images against 700, fingerprint 0123456789ab)``."""
    spread = "" if metric_value["spread"] is None else f" +- {metric_value['spread']:.2g}"
    behind = f"{metric_value['num_samples']} images"
    if metric_value["num_reference"] is not None:
        behind += f" against {metric_value['num_reference']}"
    mark = metric_value["fingerprint"]
    if mark is not None:
        behind += f", fingerprint {mark}"
        if (fingerprints.get(mark) or {}).get("random"):
            behind += ", by a RANDOM feature extractor: it means nothing"
    if metric_value.get("caution"):
        behind += f"; CAUTION: {metric_value['caution']}"
    return f"{name}: {metric_value['value']:.6g}{spread} ({behind})"


def look(
    run: Source,
    changes: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="New paths: data.path=FOLDER."),
    ] = None,
    stage: Stage = None,
    nimg: Nimg = None,
    seed: Annotated[
        int, typer.Option(min=0, help="Seed of all latents; use the same one to compare runs.")
    ] = 0,
    out: Annotated[
        Path | None, typer.Option(help="Folder; RUN/RxR/visualizations by default.", metavar="DIR")
    ] = None,
    latents: Annotated[
        list[Path] | None,
        typer.Option(
            help="Draw the directions around projected photos alone, beside each: "
            "projected.safetensors of dinogen project, or a folder of them.",
            metavar="FILE",
        ),
    ] = None,
) -> None:
    """Make images that show what a run has learnt: grids, progress, interpolations, worst samples.

    visualizations.json, next to them, says what each image shows, and why one is missing: not every
    family truncates, mixes styles or encodes images.

    [bold]Examples[/bold]

      dinogen look runs/first

      dinogen look hf://user/faces

      dinogen look runs/first --stage 16 --nimg 180000 --seed 7

      dinogen look runs/first --latents runs/first/projections
    """
    import json

    from dinogen.errors import UserError
    from dinogen.visualize.look import write_visualizations
    from launch.cli.console import setup_logging

    setup_logging()
    if latents:
        if changes or nimg is not None or seed:
            raise UserError("--latents: settles what is drawn: leave out KEY=VALUE, --nimg, --seed")
        from dinogen.visualize.latents import write_directions

        for path in write_directions(run, latents, stage, out):
            typer.echo(path)
        return
    index = write_visualizations(run, stage, nimg, seed, out, changes or ())
    entries = json.loads(index.read_text(encoding="utf-8"))
    for name, entry in entries.items():
        typer.echo(f"  {name}: {entry['file'] or 'not made: ' + entry['reason']}")
    typer.echo(index)


def serve(
    run: Source,
    host: Annotated[
        str, typer.Option(help="Address to bind to; by default only this machine can connect.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 for any free port.")] = 8000,
) -> None:
    """Serve a page that samples from a run: by seed, truncation and stage, and between two seeds.

    It uses each stage's newest checkpoint, and serves until Ctrl-C.

    [bold]Examples[/bold]

      dinogen serve runs/first

      ssh -L 8000:localhost:8000 cluster dinogen serve runs/first
    """
    from dinogen.errors import UserError
    from dinogen.hub import shown
    from launch.cli.console import setup_logging

    setup_logging()
    try:
        from dinogen.serve.server import open_site
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in ("starlette", "uvicorn"):
            raise
        raise UserError(f"serve needs {missing}: pip install 'dinogen[serve]'") from None

    site = open_site(run, host, port)
    if not site.private:
        typer.echo(f"dinogen: everyone who can reach {host} can open this page", err=True)
    typer.echo(f"{shown(run)}: {site.url} (Ctrl-C ends it)")
    site.run()


def compare(
    runs: Annotated[
        list[str],
        typer.Argument(
            help="Folders of runs, of many runs, of a study, or of configs, or hf://user/name of "
            "whole runs; KEY=VALUE is passed to dinogen evaluate.",
            metavar="RUN...",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder to write into.", metavar="DIR")],
    title: Annotated[str, typer.Option(help="Heading of the page.")] = "Comparison",
    metrics: Annotated[
        str | None,
        typer.Option(help="Measure only these, where they are missing.", metavar="fid,kid"),
    ] = None,
    over_training: Annotated[bool, typer.Option("--over-training", hidden=True)] = False,
    as_is: Annotated[
        bool, typer.Option("--as-is", help="Measure and draw nothing; show what exists.")
    ] = False,
) -> None:
    """Put runs side by side: metric values, curves, images, and where every number comes from.

    Runs whose last stage was never measured or drawn are measured (dinogen evaluate) and drawn
    (dinogen look) first, unless --as-is is given. A run that failed, or whose files are damaged, is
    listed with what is known about it, and all others are compared. The exit code is 1 if every run
    is damaged.

    The page, index.html, needs no other file; comparison.json and comparison.md say the same.

    [bold]Examples[/bold]

      dinogen compare runs/dcgan_64 runs/vae_64 --out compared

      dinogen compare configs/ablations --out compared --metrics fid

      dinogen compare runs --out compared --metrics fid,kid metrics.num_samples=10000
    """
    from dinogen.errors import UserError
    from dinogen.report.compare import write_comparison
    from launch.cli.console import setup_logging
    from launch.compare import folders_of, run_pending_steps, sort_words, sweep_checkpoints

    setup_logging()
    paths, changes = sort_words(runs)
    folders, problems = folders_of(paths)
    if not as_is:
        problems += run_pending_steps(folders, metrics, changes)
    if over_training:
        typer.echo("--over-training: is dinogen evaluate RUN --all-checkpoints now", err=True)
        if metrics is None or as_is:
            raise UserError("--over-training: name what is measured: --metrics fid; not --as-is")
        swept = [sweep_checkpoints(folder, metrics, changes) for folder in folders]
        problems += [problem for one in swept if one for problem in one.problems]
    for problem in problems:
        typer.echo(problem, err=True)
    done = write_comparison(folders, out, title)
    for name, problems in done.damaged.items():
        typer.echo(f"DAMAGED {name}: {'; '.join(problems)}", err=True)
    said = f"{len(folders)} runs"
    if done.damaged:
        said += f", {len(done.damaged)} of them with damaged files (see Failures)"
    typer.echo(f"{said}: {done.page}")
    if not done.num_sound:
        typer.echo("dinogen: no run is sound", err=True)
        raise typer.Exit(1)
