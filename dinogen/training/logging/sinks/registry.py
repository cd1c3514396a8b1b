"""Finds a sink by the name of its file, and checks what the config asks of it."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import pkgutil
from difflib import get_close_matches
from pathlib import Path

from pydantic import ValidationError

from dinogen.config import Config, ConfigError, Section, describe_errors
from dinogen.runs.run import Run
from dinogen.training.logging.sinks.base import LiveSink, SentSink, Sink

_NO_SINKS = {"base", "registry", "sender", "senders", "summary"}


def sink_names() -> list[str]:
    """Names of the sinks in this folder."""
    folder = str(Path(__file__).parent)
    return sorted({module.name for module in pkgutil.iter_modules([folder])} - _NO_SINKS)


def sink_class(name: str) -> type[Sink]:
    """The sink in the file of this name.

    Raises:
        ConfigError: there is none; names the nearest.
    """
    if name not in sink_names():
        near = get_close_matches(name, sink_names(), n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"there are {', '.join(sink_names())}"
        raise ConfigError(f"logging: unknown sink '{name}': {hint}")
    module = importlib.import_module(f"{__package__}.{name}")
    (found,) = (
        one
        for _, one in inspect.getmembers(module, inspect.isclass)
        if issubclass(one, Sink) and one.__module__ == module.__name__
    )
    return found


def sink_options(name: str, given: object) -> Section:
    """The checked options of a sink.

    Raises:
        ConfigError: an unknown key or a value out of range.
    """
    options = sink_class(name).Options
    try:
        return options.model_validate(given)
    except ValidationError as error:
        raise ConfigError(describe_errors(error, options, f"logging.{name}")) from None


def check_sinks(config: Config) -> None:
    """Refuse what ``logging`` names if it is not available here.

    Raises:
        ConfigError: an unknown name or option, or a package that is not installed.
    """
    for name, given in config.sinks.items():
        sink_options(name, given)
        package = sink_class(name).package
        if package is not None and not _installed(package):
            raise ConfigError(
                f"logging: {name} needs the package {package}, which is not installed: "
                f"pip install 'dinogen[{name}]', or leave {name} out"
            )


def _installed(package: str) -> bool:
    """Whether a package can be imported; a folder that is only called like it is none."""
    found = importlib.util.find_spec(package)
    return found is not None and found.origin is not None


def live_sinks(run: Run) -> dict[str, LiveSink]:
    """The sinks of a run that the training process writes itself, by name."""
    found = {}
    for name, given in run.config.sinks.items():
        cls = sink_class(name)
        if issubclass(cls, LiveSink):
            found[name] = cls(sink_options(name, given), run)
    return found


def sent_names(config: Config) -> list[str]:
    """The sinks of a run that each have a process of their own."""
    return [name for name in config.sinks if issubclass(sink_class(name), SentSink)]
