"""The ``dinogen`` command: gathers the commands and turns known errors into one clear line.

Nothing heavy is imported here or at the top of launch/cli: ``dinogen --help`` must be
instant, so torch, numpy and transformers are imported inside the commands that use them.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import Annotated

import typer
from typer.models import CommandInfo

from dinogen.errors import UserError
from launch.cli import latents, launch, machine, prepare, results, shards, train, weights

HELP = """Train image generators on one or many GPUs, with or without guidance by frozen features.

[bold]First time here?[/bold]  dinogen doctor, then dinogen demo
"""

EPILOG = """[bold]From photos to generated images[/bold]

  dinogen prepare PHOTOS data/faces -c my.yaml

  dinogen train my.yaml run=runs/first data.path=data/faces

  dinogen sample runs/first --num 64 --seed 0

Every command explains itself: dinogen train --help
"""

# The heading of each command, and their order.
PANELS = {
    "Data": ("prepare", "faces", "pyramids", "pack", "export-pt", "download", "shards"),
    "Train": ("train", "launch", "study", "sample", "evaluate"),
    "Weights": ("export", "import", "publish"),
    "Latents": ("project", "video"),
    "Look": ("look", "compare", "serve", "demo", "config"),
    "Machine": ("doctor",),
}

app = typer.Typer(
    name="dinogen",
    help=HELP,
    epilog=EPILOG,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"dinogen {version('dinogen')}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[
        bool,
        typer.Option(
            "--debug", envvar="DINOGEN_DEBUG", help="Show where in the code an error came from."
        ),
    ] = False,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    if debug:
        os.environ["DINOGEN_DEBUG"] = "1"


for group in (prepare, shards, train, launch, weights, latents, results, machine):
    group.register(app)


def _arrange() -> None:
    """Put every command under its heading."""
    panel_of = {name: panel for panel, names in PANELS.items() for name in names}
    order = list(panel_of)
    for command in app.registered_commands:
        command.rich_help_panel = panel_of[_name(command)]
    for group in app.registered_groups:
        group.rich_help_panel = panel_of[str(group.name)]
    app.registered_commands.sort(key=lambda command: order.index(_name(command)))


def _name(command: CommandInfo) -> str:
    """The name that typer will give a command."""
    if command.name:
        return command.name
    assert command.callback is not None
    return command.callback.__name__.replace("_", "-")


_arrange()


def main() -> None:
    """Run the command line; known errors end as one line with the error's exit code."""
    try:
        app()
    except Exception as error:
        line = _line(error)
        if os.environ.get("DINOGEN_DEBUG") or line is None:
            raise
        with suppress(OSError):  # the terminal is gone
            print(f"dinogen: {line}", file=sys.stderr)
        sys.exit(getattr(error, "exit_code", 1))
    finally:
        _leave_quietly()


def _line(error: Exception) -> str | None:
    """The message of an error that the user can fix; None if a traceback is needed."""
    # shards has its own base class; it is imported already if the error is one of its.
    shards = sys.modules.get("shards.errors")
    if isinstance(error, UserError) or (
        shards is not None and isinstance(error, shards.ShardsError)
    ):
        return str(error)
    if isinstance(error, OSError) and error.filename is not None:
        # of two names the second is the target of a rename
        name = error.filename2 or error.filename
        return f"{name}: {error.strerror}: choose a writable folder"
    return None


def _leave_quietly() -> None:
    """Discard output that cannot be written; otherwise Python exits with a code of its own."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            with suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
