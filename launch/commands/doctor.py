"""``dinogen doctor``: what this machine has, a line each, with what to do about it."""

from __future__ import annotations

from typing import Annotated

import typer

MARKS = {
    "ok": "[green]✓[/]",
    "note": "[dim]·[/]",
    "warn": "[yellow]![/]",
    "broken": "[bold red]✗[/]",
}


def register(app: typer.Typer) -> None:
    """Add ``dinogen doctor`` to the command line."""
    app.command("doctor")(doctor)


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON list, for scripts.")] = False,
) -> None:
    """Tell what this machine has, and what to do about what it lacks.

    Exits 1 if something is broken that every run needs.

    [bold]Example[/bold]  dinogen doctor --json
    """
    import json

    from launch.doctor import examine

    findings = []
    for finding in examine():
        findings.append(finding)
        if not as_json:
            _print(finding.name, finding.status, finding.found, finding.mend)
    if as_json:
        typer.echo(json.dumps([finding.to_dict() for finding in findings], indent=2))
    if any(finding.status == "broken" for finding in findings):
        raise typer.Exit(1)


def _print(name: str, status: str, found: str, mend: str) -> None:
    from rich.console import Console
    from rich.markup import escape

    console = Console(highlight=False, soft_wrap=True)
    console.print(f"{MARKS[status]} [bold]{name:<14}[/bold] {escape(found)}")
    if mend:
        console.print(f"  {'':<14} [dim]->[/] {escape(mend)}")
