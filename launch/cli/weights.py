"""Weights in and out: ``dinogen export``, ``import`` and ``publish``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from launch.cli.results import Nimg, Source, Stage

if TYPE_CHECKING:
    from dinogen.formats.runs import Weights
    from dinogen.hub import Address


imports = typer.Typer(
    help="Write weights that others have trained as a run: for init_from, sample, evaluate and "
    "every other command that takes one.",
    rich_markup_mode="rich",
)
Out = Annotated[Path, typer.Argument(help="Folder of the run to write.", metavar="OUT")]


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command()(export)
    app.add_typer(imports, name="import", no_args_is_help=True)
    app.command()(publish)


def export(
    run: Source,
    out: Annotated[Path, typer.Argument(help="File to write.", metavar="OUT")],
    kind: Annotated[
        str,
        typer.Option(
            "--format",
            help="safetensors (OUT.safetensors): the weights, for dinogen; torch-export (OUT.pt2) "
            "and onnx (OUT.onnx): a graph that runs without dinogen; diffusers (a folder): a "
            "pipeline around a U-Net of ddpm.",
        ),
    ] = "safetensors",
    stage: Stage = None,
    nimg: Nimg = None,
    licence: Annotated[
        str | None, typer.Option(help="Licence of the weights, for the file's card.")
    ] = None,
    intended_use: Annotated[
        str | None, typer.Option(help="What the generator may be used for, for its card.")
    ] = None,
) -> None:
    """Write the generator of a run as one file, with its config in the metadata.

    It is the moving average that sample uses. As safetensors, bit for bit: sample, evaluate, look
    and serve take the file in place of a run. As torch-export or onnx, a graph from latents to
    images, or of one step of a diffusion walk, for any batch size: the file is compared with the
    network before it is written. As diffusers, a folder that its DDIMPipeline or DDPMPipeline
    loads. The metadata hold a card: data, guide, metrics as far as they were measured, licence and
    intended use.

    [bold]Examples[/bold]

      dinogen export runs/first first.safetensors

      dinogen export runs/first first.onnx --format onnx

      dinogen export runs/ddpm_64 ddpm_64 --format diffusers

      dinogen export runs/first early.safetensors --stage 16 --nimg 180000
    """
    from dinogen.formats.export import export as export_run
    from dinogen.runs.layout import stage_name
    from launch.cli.console import setup_logging

    setup_logging()
    done = export_run(run, out, kind, stage, nimg, licence, intended_use)
    info = done.info
    same = "" if done.difference is None else f", within {done.difference:.1e} of the network"
    typer.echo(
        f"{done.path}: {info['network']['class'].rpartition('.')[2]} of stage "
        f"{stage_name(info['resolution'])} at {info['nimg']} images, "
        f"{done.num_parameters:,} parameters, guide: {info.get('guide_label', 'none')}{same}"
    )


@imports.command("stylegan2")
def import_stylegan2(
    file: Annotated[
        Path,
        typer.Argument(help="Pickle to read, or its hf://user/name/FILE.pkl.", metavar="FILE.pkl"),
    ],
    out: Out,
) -> None:
    """Read a pickle of stylegan2-ada-pytorch or of a StyleGAN2 in stylegan3.

    Generator, discriminator, averages and ADA's p. Nothing in the pickle is run.

    [bold]Examples[/bold]

      dinogen import stylegan2 ffhq256.pkl runs/ffhq256

      dinogen sample runs/ffhq256 --num 64
    """
    from dinogen.formats.runs import fetch_file
    from dinogen.formats.stylegan2 import read

    _write(file, out, read, fetch_file)


@imports.command("guided-diffusion")
def import_guided_diffusion(
    file: Annotated[
        Path,
        typer.Argument(
            help="State dict to read, or its hf://user/name/FILE.pt.", metavar="FILE.pt"
        ),
    ],
    out: Out,
    image_size: Annotated[int, typer.Option(min=1, help="Side of the images, pixels.")],
    num_heads: Annotated[
        int | None,
        typer.Option(min=1, help="Heads of each attention; 4 unless it was set in training."),
    ] = None,
    head_channels: Annotated[
        int | None,
        typer.Option(
            min=1, help="Or the width of each head (num_head_channels); 64 in released models."
        ),
    ] = None,
    new_attention_order: Annotated[
        bool, typer.Option("--new-attention-order", help="Trained with use_new_attention_order.")
    ] = False,
    schedule: Annotated[str, typer.Option(help="noise_schedule: linear or cosine.")] = "linear",
    num_steps: Annotated[int, typer.Option(min=1, help="diffusion_steps.")] = 1000,
    rescale_timesteps: Annotated[
        bool | None,
        typer.Option(
            "--rescale-timesteps/--no-rescale-timesteps",
            help="rescale_timesteps; to be given unless there are 1000 steps.",
        ),
    ] = None,
    prediction: Annotated[str, typer.Option(help="epsilon, or x0 (predict_xstart).")] = "epsilon",
) -> None:
    """Read a U-Net of OpenAI's guided-diffusion or improved-diffusion as family ddpm.

    FILE.pt is a state dict, such as ema_0.9999_250000.pt. Its shapes tell the network; the options
    tell the rest, by the names of their flags where ours differ. The averages begin where the
    weights do. Of a learnt variance only the image is kept, which is said. Classifiers and
    upsamplers are refused.

    [bold]Examples[/bold]

      dinogen import guided-diffusion cats.pt runs/cats --image-size 256 --head-channels 64

      dinogen sample runs/cats --num 16
    """
    from dinogen.formats.guided_diffusion import read
    from dinogen.formats.runs import fetch_file

    _write(
        file,
        out,
        lambda found: read(
            found,
            image_size,
            num_heads=num_heads,
            head_channels=head_channels,
            new_attention_order=new_attention_order,
            schedule=schedule,
            num_steps=num_steps,
            rescale_timesteps=rescale_timesteps,
            prediction=prediction,
        ),
        fetch_file,
    )


@imports.command("diffusers")
def import_diffusers(
    folder: Annotated[
        Path, typer.Argument(help="Folder to read, or hf://user/name.", metavar="FOLDER")
    ],
    out: Out,
    image_size: Annotated[
        int | None, typer.Option(min=1, help="Side of the images, where the config does not say.")
    ] = None,
    schedule: Annotated[
        str | None, typer.Option(help="linear or cosine, for a folder without scheduler.")
    ] = None,
    num_steps: Annotated[
        int | None, typer.Option(min=1, help="Time steps, for a folder without scheduler; 1000.")
    ] = None,
    prediction: Annotated[
        str | None, typer.Option(help="epsilon, v or x0, for a folder without scheduler.")
    ] = None,
) -> None:
    """Read a UNet2DModel of diffusers, or a pipeline around one, as family ddpm.

    FOLDER is what save_pretrained wrote, or dinogen export --format diffusers: the second comes
    back as it was. diffusers need not be installed. Text-to-image models are refused.

    [bold]Examples[/bold]

      dinogen import diffusers ddpm-cat-256 runs/cats

      dinogen export runs/first first --format diffusers
    """
    from dinogen.formats.diffusers import fetch_folder, read

    _write(
        folder,
        out,
        lambda found: read(
            found,
            image_size=image_size,
            schedule=schedule,
            num_steps=num_steps,
            prediction=prediction,
        ),
        fetch_folder,
    )


def _write(
    source: Path,
    out: Path,
    read: Callable[[Path], Weights],
    fetch: Callable[[Address], Path],
) -> None:
    """Read weights and write them as a run; ``out`` is checked first, for reading takes time."""
    from dinogen import hub
    from dinogen.formats.runs import FormatError, check_free, write_run
    from dinogen.runs.run import Run as RunFolder
    from launch.cli.console import setup_logging

    setup_logging()
    check_free(out)
    if hub.is_address(source):
        source = fetch(hub.parse(source))
    try:
        weights = read(source)
        checkpoint = write_run(out, weights)
    except FormatError as error:
        # a path of the hub's cache tells nobody what it is
        raise FormatError(str(error).replace(str(source), hub.shown(source))) from None
    config = RunFolder(out).config_file
    typer.echo(
        f"{checkpoint}: family {weights.family['name']} at {weights.resolution} pixels, from "
        f"{hub.shown(weights.source)}\ntrain on: dinogen train {config} run=NEW init_from={out} "
        "data.path=DATA stages.0.kimg=1000"
    )


def publish(
    run: Source,
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

    Paths of this machine are shortened to their last name, URLs lose user, password and query, and
    the sections cluster: and logging: are left out.

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
    what = Publication(run, hub.parse(address), stage, nimg, licence, intended_use)
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
