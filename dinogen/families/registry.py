"""Finds a family: in this folder, among installed packages, or in a file of the user's own."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import sys
from difflib import get_close_matches
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType

from pydantic import ValidationError

from dinogen.config import Config, ConfigError, FamilyConfig, Section, describe_errors
from dinogen.families.base import Family
from dinogen.families.earlier import with_earlier_members

ENTRY_POINTS = "dinogen.families"
_NO_FAMILIES = {"abilities", "base", "earlier", "gan", "registry"}


def family_names() -> list[str]:
    """Names of the families in this folder, and of those that installed packages offer."""
    folder = str(Path(__file__).parent)
    own = {m.name for m in pkgutil.iter_modules([folder])} - _NO_FAMILIES
    return sorted(own | set(_offered()))


def family_class(config: FamilyConfig) -> type[Family]:
    """The one Family subclass that a config names.

    Raises:
        ConfigError: there is no such family, file or class; names the nearest.
    """
    if config.file is not None:
        return _class_in_file(Path(config.file).absolute())
    offered = _offered()
    if config.name in offered:
        found = _one_family(offered[config.name].load(), f"entry point {config.name}")
        return with_earlier_members(found)
    names = family_names()
    if config.name not in names:
        near = get_close_matches(config.name, names, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"families: {', '.join(names)}"
        raise ConfigError(f"family.name: unknown family '{config.name}': {hint}")
    module = importlib.import_module(f"dinogen.families.{config.name}")
    return _one_family(module, module.__name__)


def family_options(config: Config) -> Section:
    """The checked options of the config's family, defaults filled in.

    Raises:
        ConfigError: an unknown key or a value out of range.
    """
    options = family_class(config.family).Options
    try:
        return options.model_validate(config.family.options)
    except ValidationError as error:
        raise ConfigError(describe_errors(error, options, "family")) from None


def resolve(config: Config) -> Config:
    """The config with the family's options checked and their defaults written out.

    Raises:
        ConfigError: an option of ``family:`` is unknown or out of range.
    """
    data = config.model_dump(mode="json")
    family = {"name": config.family.name, "file": config.family.file}
    data["family"] = family | family_options(config).model_dump(mode="json")
    return Config.model_validate(data)


@cache
def _offered() -> dict[str, EntryPoint]:
    """Entry points of installed packages by their names."""
    return {point.name: point for point in entry_points(group=ENTRY_POINTS)}


@cache
def _class_in_file(path: Path) -> type[Family]:
    """The family of a file outside the package, which is run once."""
    name = f"dinogen_family_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise ConfigError(
            f"family.file: {path} is not a Python file: name one that defines a family"
        )
    module = importlib.util.module_from_spec(spec)
    # by this name its class is found again, as pickling and typing do
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise ConfigError(
            f"family.file: {path} cannot be imported: {type(error).__name__}: {error}"
        ) from error
    return with_earlier_members(_one_family(module, str(path)))


def _one_family(found: ModuleType | type, source: str) -> type[Family]:
    """The family that an entry point names, or the one that a module defines.

    Raises:
        ConfigError: it defines none, or several.
    """
    if isinstance(found, type):
        if issubclass(found, Family):
            return found
        raise ConfigError(f"{source}: {found.__name__} is not a subclass of Family")
    classes = [
        item
        for item in vars(found).values()
        if isinstance(item, type) and issubclass(item, Family) and item.__module__ == found.__name__
    ]
    if len(classes) != 1:
        names = ", ".join(item.__name__ for item in classes) or "none"
        raise ConfigError(f"{source}: has to define one subclass of Family; found: {names}")
    return classes[0]
