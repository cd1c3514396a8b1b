"""The base of all config sections: reading the YAML file, overrides, and error messages."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from dinogen.errors import ConfigError

# A link to configs/ in a clone, a copy of it in a wheel.
SHIPPED = Path(__file__).parents[1].joinpath("configs").resolve()


class Section(BaseModel):
    """One mapping of the YAML file; refuses keys that it does not declare."""

    model_config = ConfigDict(extra="forbid", validate_default=True)


def describe_errors(error: ValidationError, model: type[BaseModel], source: str) -> str:
    """Pydantic's errors as one line each: ``source: key: what is wrong, and the remedy``."""
    lines = []
    items = error.errors()
    hints = {item["loc"]: _hint(item["loc"], model) for item in items if _is_unknown(item)}
    misspelt = {(*loc[:-1], near) for loc, (near, _) in hints.items()}
    for item in items:
        loc = item["loc"]
        key = ".".join(map(str, loc))
        if loc in hints:
            lines.append(f"{source}: unknown key '{key}': {hints[loc][1]}")
        elif not (item["type"] == "missing" and loc in misspelt) and not _follows(item, items):
            lines.append(f"{source}: {key + ': ' if key else ''}{_message(item)}")
    return "\n".join(lines)


def _is_unknown(item: ErrorDetails) -> bool:
    return item["type"] == "extra_forbidden"


def _hint(loc: tuple[int | str, ...], model: type[BaseModel]) -> tuple[str | None, str]:
    """The nearest valid name of an unknown key, and the advice."""
    *parents, key = map(str, loc)
    names = _names_at(model, parents)
    near = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
    if near:
        return near[0], f"did you mean '{near[0]}'?"
    return None, f"valid keys: {', '.join(names)}"


def _follows(item: ErrorDetails, items: list[ErrorDetails]) -> bool:
    """Whether a list is too short only because its invalid items, reported too, do not count."""
    depth = len(item["loc"])
    return item["type"] == "too_short" and any(
        len(other["loc"]) > depth and other["loc"][:depth] == item["loc"] for other in items
    )


def _message(item: ErrorDetails) -> str:
    """What is wrong with a value, in the words of a YAML file."""
    given = item["input"]
    if item["type"] == "missing":
        return "is missing: give it a value"
    if item["type"] == "model_type":
        what = "is empty" if given is None else f"holds {given!r}"
        return f"{what}, but it is a section: indent its keys below it, or leave it out"
    if item["type"] == "tuple_type":
        return f"must be a list, not {given!r}"
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] != "value_error" and isinstance(given, (str, int, float)):
        message += f", not {given!r}"
    return message


def _names_at(model: type[BaseModel], location: list[str]) -> list[str]:
    """Valid keys of the section at ``location``."""
    schema = model.model_json_schema()
    node: dict[str, Any] = schema
    for part in location:
        if part.isdigit():
            node = node.get("items", {})
        elif kinds := node.get("discriminator", {}).get("mapping"):  # the name selects the kind
            node = {"$ref": kinds.get(part, "")}
        else:  # in a mapping with free names all values have the same schema
            node = node.get("properties", {}).get(part) or node.get("additionalProperties") or {}
        choices = [node, *node.get("allOf", []), *node.get("anyOf", [])]
        reference = next((one["$ref"] for one in choices if "$ref" in one), None)
        if reference:
            node = schema["$defs"].get(reference.rsplit("/", 1)[-1], {})
    return list(node.get("properties", {}))


def shipped_configs() -> dict[str, Path]:
    """The configs that dinogen brings, by name: ``guided_64``, and the folder ``ablations``."""
    folders = {path.name: path for path in sorted(SHIPPED.iterdir()) if path.is_dir()}
    return {path.stem: path for path in sorted(SHIPPED.glob("*.yaml"))} | folders


def find_config(path: Path) -> Path:
    """``path``, or where nothing is there the shipped config that it names, with or without .yaml.

    Raises:
        ConfigError: it is a bare name, and neither a file nor shipped; lists what is shipped.
    """
    if path.exists() or path.name != str(path):
        return path
    shipped = shipped_configs()
    if found := shipped.get(path.name.removesuffix(".yaml")):
        return found
    raise ConfigError(
        f"{path}: no such config file, and none of the shipped ones: {', '.join(shipped)}"
    )


def read_mapping(path: Path) -> dict[str, Any]:
    """The mapping that a YAML file holds; an empty file is an empty mapping.

    Raises:
        ConfigError: no such file, a folder, no text, no YAML, a key that occurs twice, no mapping.
    """
    if path.is_fifo() and path.parts[:2] not in (("/", "dev"), ("/", "proc")):
        # opening a named pipe would block; a shell's <(command) is allowed
        raise ConfigError(f"{path}: cannot be read as text: it is a pipe")
    try:
        data = yaml.load(path.read_text(encoding="utf-8-sig"), _UniqueKeyLoader)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such config file") from None
    except IsADirectoryError:
        shipped = path.name == str(path) and path.name in shipped_configs()
        other = f", or {path}.yaml for the config that dinogen brings" if shipped else ""
        raise ConfigError(f"{path}: it is a folder: give a YAML file{other}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as text: {error}") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}{line}: not valid YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    except RecursionError:
        raise ConfigError(f"{path}: not valid YAML: it is nested too deep") from None
    except (ValueError, OverflowError) as error:  # for example a date in month 13
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: a config is a mapping of keys, not a {type(data).__name__}")
    return data


def override(data: dict[str, Any], item: str, defaults: Mapping[str, Any]) -> None:
    """Set ``a.b.c=value`` inside ``data``; missing sections on the way are created.

    Args:
        data: changed in place.
        item: ``key=value``.
        defaults: the whole default config; a list that ``data`` lacks is copied from it, because
            its items are addressed by number.

    Raises:
        ConfigError: no ``key=value``, no YAML, or a key below a single value or beyond a list.
    """
    key, found, text = item.partition("=")
    if not found or not key.strip():
        raise ConfigError(f"override '{item}': write key=value, as in stages.0.kimg=2")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"override '{item}': the value is not valid YAML: {error}") from None
    node: Any = data
    default: Any = defaults
    parts = key.strip().split(".")
    for depth, part in enumerate(parts):
        here = ".".join(parts[:depth]) or "the config"
        if isinstance(node, list):
            if not part.isdigit() or int(part) >= len(node):
                raise ConfigError(f"override '{item}': {here} has items 0 to {len(node) - 1}")
            index: Any = int(part)
        elif isinstance(node, dict):
            index = part
        else:
            raise ConfigError(f"override '{item}': {here} is a single value, not a section")
        if depth == len(parts) - 1:
            node[index] = value
            return
        default = default.get(part) if isinstance(default, Mapping) else None
        if isinstance(node, dict) and node.get(index) is None:
            node[index] = copy.deepcopy(default) if isinstance(default, list) else {}
        node = node[index]


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML's safe loader, but a key that occurs twice is an error: the first would be lost."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = key_node.value
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(
                    problem="a key is a list or a mapping", problem_mark=key_node.start_mark
                )
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"key '{key}' occurs twice: keep one", problem_mark=key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)
