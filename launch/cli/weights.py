"""Weights in and out: ``dinogen export`` and ``publish``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from launch.cli.results import Nimg, Run, Stage


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command()(export)
    app.command()(publish)


def export(
    run: Run,
    out: Annotated[Path, typer.Argument(help="File to write.", metavar="OUT.safetensors")],
    stage: Stage = None,
    nimg: Nimg = None,
    licence: Annotated[
        str | None, typer.Option(help="Licence of the weights, for the file's card.")
    ] = None,
    intended_use: Annotated[
        str | None, typer.Option(help="What the generator may be used for, for its card.")
    ] = None,
) -> None:
    """Write the generator of a run as one safetensors file, with its config in the metadata.

    It is the moving average that sample uses, bit for bit. sample, evaluate, look and serve take
    the file in place of a run. Its metadata hold a card: data, guide, metrics as far as they were
    measured, licence and intended use.

    [bold]Examples[/bold]

      dinogen export runs/first first.safetensors

      dinogen export runs/first early.safetensors --stage 16 --nimg 180000
    """
    from dinogen.runs.layout import stage_name
    from dinogen.training.checkpointing.export import export as export_run
    from launch.cli.console import setup_logging

    setup_logging()
    said = {"licence": licence, "intended_use": intended_use}
    done = export_run(run, out, stage, nimg, **{k: v for k, v in said.items() if v is not None})
    info = done.info
    typer.echo(
        f"{done.path}: {info['network']['class'].rpartition('.')[2]} of stage "
        f"{stage_name(info['resolution'])} at {info['nimg']} images, "
        f"{done.num_parameters:,} parameters, guide: {info.get('guide_label', 'none')}"
    )


def publish(
    run: Run,
    address: Annotated[
        str,
        typer.Argument(
            help="Repository on the hub, hf://user/name, or a branch of it, hf://user/name@branch.",
            metavar="ADDRESS",
        ),
    ],
    stage: Stage = None,
    nimg: Nimg = None,
    licence: Annotated[
        str | None,
        typer.Option(help="Licence of the weights, such as apache-2.0 or cc-by-nc-4.0."),
    ] = None,
    intended_use: Annotated[
        str | None, typer.Option(help="What the generator may be used for, for its card.")
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="Make the repository private.")
    ] = False,
    message: Annotated[str | None, typer.Option(help="Of the commit.", metavar="TEXT")] = None,
    dry_run: Annotated[
        Path | None,
        typer.Option(help="Write the files to this folder and upload nothing.", metavar="FOLDER"),
    ] = None,
) -> None:
    """Publish the generator of a run on the hub: weights, config, samples, metrics and a card.

    Log in first: hf auth login, or HF_TOKEN. The repository is made if it is not there. Published
    again, its files are replaced in one commit. Look at the card first: --dry-run FOLDER.

    Paths of this machine are shortened to their last name, and the section cluster: is left out.

    [bold]Examples[/bold]

      dinogen publish runs/first hf://user/faces --licence cc-by-nc-4.0 --dry-run card

      dinogen publish runs/first hf://user/faces --licence cc-by-nc-4.0 --private

      dinogen sample hf://user/faces
    """
    from dinogen import hub
    from dinogen.publish.publish import Publication, write_publication
    from dinogen.publish.publish import publish as publish_run
    from launch.cli.console import setup_logging

    setup_logging()
    used = {} if intended_use is None else {"intended_use": intended_use}
    what = Publication(run, hub.parse(address), stage, nimg, licence, **used)
    if licence is None:
        typer.echo(
            "dinogen: NO LICENCE: the card will say that none is stated, so nobody may use the "
            "weights: give --licence",
            err=True,
        )
    if dry_run is not None:
        write_publication(what, dry_run)
        typer.echo(f"{dry_run}: what would be published as {what.address}; nothing was uploaded")
        return
    done = publish_run(what, private, message)
    typer.echo(f"{done.url}: commit {done.commit}")
    if done.before == done.commit:
        typer.echo("nothing has changed since that commit")
    elif done.before is not None:
        typer.echo(f"it replaces commit {done.before}")
    typer.echo(f"to draw from it: dinogen sample {what.address}")
