"""Reads a YAML file as a mapping, and applies ``key=value`` overrides to it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from dinogen.errors import ConfigError


def read_mapping(path: Path) -> dict[str, Any]:
    """The mapping that a YAML file holds; an empty file is an empty mapping.

    Raises:
        ConfigError: no such file, no text, no YAML, a key that stands twice, or no mapping.
    """
    if path.is_fifo() and path.parts[:2] not in (("/", "dev"), ("/", "proc")):
        # it would be waited for; of a shell's <(command) it is what is wanted
        raise ConfigError(f"{path}: cannot be read as text: it is a pipe")
    try:
        data = yaml.load(path.read_text(encoding="utf-8-sig"), _UniqueKeyLoader)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such config file") from None
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
    except (ValueError, OverflowError) as error:  # such as a date in month 13
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: a config is a mapping of keys, not a {type(data).__name__}")
    return data


def override(data: dict[str, Any], item: str, defaults: Mapping[str, Any]) -> None:
    """Set ``a.b.c=value`` inside ``data``; what is on the way is made.

    Args:
        data: changed in place.
        item: ``key=value``.
        defaults: the whole config where nothing is set; a list that ``data`` lacks is taken from
            it, since its items are addressed by number.

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
    """YAML's safe loader, but a key that stands twice is an error: the first would be lost."""

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
                    problem=f"key '{key}' stands twice: keep one", problem_mark=key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)
