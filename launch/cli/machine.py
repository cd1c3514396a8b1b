"""``dinogen doctor`` and ``dinogen config``: check this machine, show a resolved config."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from dinogen.config import Config


MARKS = {
    "ok": "[green]✓[/]",
    "note": "[dim]·[/]",
    "warn": "[yellow]![/]",
    "broken": "[bold red]✗[/]",
}


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")] = False,
) -> None:
    """Check what this machine has, and say what to do about what is missing.

    Exits with 1 if something that every run needs is broken.

    [bold]Example[/bold]  dinogen doctor --json
    """
    import json

    from launch.doctor import examine

    findings = []
    for finding in examine():
        findings.append(finding)
        if not as_json:
            _print(finding.name, finding.status, finding.found, finding.remedy)
    if as_json:
        typer.echo(json.dumps([finding.to_dict() for finding in findings], indent=2))
    if any(finding.status == "broken" for finding in findings):
        raise typer.Exit(1)


def _print(name: str, status: str, found: str, remedy: str) -> None:
    from rich.console import Console
    from rich.markup import escape

    console = Console(highlight=False, soft_wrap=True)
    console.print(f"{MARKS[status]} [bold]{name:<14}[/bold] {escape(found)}")
    if remedy:
        console.print(f"  {'':<14} [dim]->[/] {escape(remedy)}")


app = typer.Typer(help="Show a resolved config, or write the JSON schema for editors.")


def register(parent: typer.Typer) -> None:
    """Add the commands to the command line."""
    parent.command()(doctor)
    parent.add_typer(app, name="config", no_args_is_help=True)


@app.command()
def show(
    file: Annotated[Path, typer.Argument(help="YAML file of a run.", metavar="FILE")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes, as in train.")
    ] = None,
    ranks: Annotated[
        int, typer.Option(min=1, help="Number of ranks, for the config of DeepSpeed.")
    ] = 1,
) -> None:
    """Print the whole resolved config as YAML: defaults, then the file, then KEY=VALUE changes.

    A comment above each key says what it means.
    With the engine deepspeed, DeepSpeed's own config of each stage follows as comments.

    [bold]Examples[/bold]

      dinogen config show configs/demo.yaml stages.0.kimg=2

      dinogen config show configs/demo.yaml engine.name=deepspeed engine.zero=2 --ranks 8
    """
    from dinogen.config import load_config

    config = load_config(file, overrides or ())
    from dinogen.families.registry import (  # imports torch; mistakes are reported before
        family_class,
        resolve,
    )
    from launch.cli.keys import commented

    whole = json_schema()
    if config.family.file is not None:
        options = family_class(config.family).Options.model_json_schema()
        whole["$defs"] |= options.pop("$defs", {})
        whole["properties"]["family"] = options
    typer.echo(commented(resolve(config).model_dump(mode="json"), whole), nl=False)
    if config.engine.name == "deepspeed":
        _show_deepspeed(config, ranks)


def _show_deepspeed(config: Config, num_ranks: int) -> None:
    """Print DeepSpeed's own config of each stage as comments: the output stays valid YAML."""
    import json

    from dinogen.runs.layout import stage_name
    from dinogen.training.engines.deepspeed import deepspeed_config

    for stage in config.stages:
        passed = deepspeed_config(config, stage, num_ranks)
        size = stage_name(stage.resolution)
        typer.echo(f"# config of DeepSpeed in stage {size} on {num_ranks} rank(s):")
        typer.echo("".join(f"#   {line}\n" for line in json.dumps(passed, indent=2).splitlines()))


@app.command()
def schema(
    out: Annotated[
        Path | None, typer.Argument(help="File to write; printed if left out.", metavar="[OUT]")
    ] = None,
) -> None:
    """Write the JSON schema that editors use to complete and check configs.

    A YAML file refers to it in its first line: # yaml-language-server: $schema=schema.json

    [bold]Example[/bold]  dinogen config schema configs/schema.json
    """
    import json

    _write(json.dumps(json_schema(), indent=2) + "\n", out)


@app.command()
def reference(
    out: Annotated[
        Path | None, typer.Argument(help="File to write; printed if left out.", metavar="[OUT]")
    ] = None,
) -> None:
    """Write the page that lists all keys, their defaults and what they mean, as Markdown.

    [bold]Example[/bold]  dinogen config reference docs/config-reference.md
    """
    from launch.cli.keys import reference as page_of

    _write(page_of(json_schema()), out)


def _write(text: str, out: Path | None) -> None:
    from dinogen.files import write_text

    if out is None:
        typer.echo(text, nl=False)
    else:
        write_text(out, text)
        typer.echo(f"wrote {out}")


def json_schema() -> dict[str, Any]:
    """Schema of a whole config; ``family`` has the options of the family that it names."""
    from dinogen.config import Config, FamilyConfig
    from dinogen.families.registry import family_class, family_names

    whole = Config.model_json_schema()
    choices = []
    for name in family_names():
        options = family_class(FamilyConfig(name=name)).Options.model_json_schema()
        whole["$defs"].update(options.pop("$defs", {}))
        options["title"] = f"family {name}"
        options["properties"] = {
            "name": {"const": name, "description": "a file of dinogen/families"},
            **options.get("properties", {}),
        }
        if name != FamilyConfig().name:
            options["required"] = ["name", *options.get("required", ())]
        choices.append(options)
    own = {"type": "string", "description": "your own Python file that defines the family"}
    choices.append({"title": "your family", "properties": {"file": own}, "required": ["file"]})
    whole["$defs"].pop("FamilyConfig")
    whole["properties"]["family"] = {"oneOf": choices}
    return whole
