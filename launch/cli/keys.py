"""What each key of a config means, from its schema: comments in a YAML, and a page of all keys."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

Schema = Mapping[str, Any]
WIDTH = 96
HEAD = """# All keys of a config

Written by `dinogen config reference docs/config-reference.md`; `dinogen config show CONFIG` prints
the keys of one run with their values.
"""


def commented(data: Mapping[str, Any], schema: Schema) -> str:
    """A config as YAML with a comment above each key that the schema describes.

    Args:
        data: the config, JSON-ready.
        schema: of the whole config, with its ``$defs``.
    """
    return "".join(f"{line}\n" for line in _mapping(data, schema, schema, ""))


def _mapping(data: Mapping[str, Any], node: Schema, whole: Schema, indent: str) -> Iterator[str]:
    for key, value in data.items():
        below = properties(node).get(key) or node.get("additionalProperties") or {}
        inside = resolved(below, whole, value)
        words = below.get("description") or inside.get("description") or ""
        for line in textwrap.wrap(words, WIDTH - len(indent)):
            yield f"{indent}# {line}"
        if isinstance(value, dict) and value:
            yield f"{indent}{_inline(key)}:"
            yield from _mapping(value, inside, whole, indent + "  ")
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            yield f"{indent}{_inline(key)}:"
            yield from _items(value, inside, whole, indent)
        else:
            yield f"{indent}{_inline(key)}: {_inline(value)}"


def _inline(value: Any) -> str:
    """A key or a value as YAML on one line."""
    import yaml

    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=float("inf"))
    return text.removesuffix("\n").removesuffix("\n...")


def _items(values: list[Any], node: Schema, whole: Schema, indent: str) -> Iterator[str]:
    """The mappings of a list; keys are described in the first alone."""
    for number, value in enumerate(values):
        item = resolved(node.get("items", {}), whole, value) if number == 0 else {}
        dash = "- "
        for line in _mapping(value, item, whole, indent + "  "):
            is_comment = line.lstrip().startswith("#")
            yield line if is_comment else f"{indent}{dash}{line[len(indent) + 2 :]}"
            dash = dash if is_comment else "  "


def properties(node: Schema) -> Mapping[str, Schema]:
    """The keys of a section by their names."""
    found: Mapping[str, Schema] = node.get("properties", {})
    return found


def resolved(node: Schema, whole: Schema, value: Any = None) -> Schema:
    """The schema behind references and alternatives.

    Args:
        node: of a key.
        whole: where definitions are found.
        value: chooses among alternatives by its ``name``; None: the first that is a section.
    """
    name = value.get("name") if isinstance(value, dict) else None
    while True:
        if "$ref" in node:
            node = whole["$defs"][node["$ref"].rsplit("/", 1)[-1]]
            continue
        choices = [resolved(one, whole) for key in _CHOICES for one in node.get(key, ())]
        sections = [one for one in choices if "properties" in one or "items" in one]
        if not sections:
            return node
        named = (one for one in sections if properties(one).get("name", {}).get("const") == name)
        node = next(named, sections[0])


_CHOICES = ("allOf", "anyOf", "oneOf")


def reference(schema: Schema) -> str:
    """The page of all keys, in Markdown: a table per section, and one per family."""
    parts = [HEAD]
    top = [key for key in properties(schema) if not _is_section(key, schema)]
    parts.append("## At the top\n\n" + _table({k: properties(schema)[k] for k in top}, schema))
    for key, below in properties(schema).items():
        if key in top:
            continue
        if key == "family":
            for family in below["oneOf"]:
                parts.append(f"## {family['title']}\n\n" + _table(properties(family), schema))
            continue
        parts += _sections(key, below, schema)
    parts += _objectives(schema)
    return "\n".join(parts)


def _is_section(key: str, schema: Schema) -> bool:
    return key == "family" or "properties" in _section(properties(schema)[key], schema)


def _section(below: Schema, whole: Schema) -> Schema:
    """The keys inside a key: of a section, of a list's items or of a mapping's values."""
    node = resolved(below, whole)
    inside = node.get("items") or node.get("additionalProperties")
    return resolved(inside, whole) if isinstance(inside, dict) else node


def _sections(name: str, below: Schema, whole: Schema) -> Iterator[str]:
    """A section and the sections in it."""
    node = _section(below, whole)
    words = below.get("description") or node.get("description") or ""
    kind = resolved(below, whole)
    mark = "[]" if "items" in kind else ".NAME" if "additionalProperties" in kind else ""
    mark = "" if kind.get("additionalProperties") is False else mark
    own = properties(node)
    inner = {key: one for key, one in own.items() if "properties" in _section(one, whole)}
    plain = {key: one for key, one in own.items() if key not in inner}
    yield f"## {name}{mark}\n\n{words}\n\n{_table(plain, whole)}" if plain else ""
    for key, one in inner.items():
        yield from _sections(f"{name}{mark}.{key}", one, whole)


def _objectives(schema: Schema) -> Iterator[str]:
    """The sections that only a family's keys refer to: each objective, discriminator, text."""
    shown = ("Options", "Objective")
    for name, node in schema["$defs"].items():
        is_objective = "weight" in properties(node) and "name" in properties(node)
        if is_objective or name.endswith(shown):
            title = properties(node).get("name", {}).get("const")
            title = f"family.objectives[], {title}" if title else f"{_family(name, schema)}: {name}"
            yield f"## {title}\n\n{_table(properties(node), schema)}"


def _family(name: str, schema: Schema) -> str:
    """Title of the family whose keys refer to a definition."""
    families = properties(schema)["family"]["oneOf"]
    return next(str(one["title"]) for one in families if f'"#/$defs/{name}"' in json.dumps(one))


def _table(keys: Mapping[str, Schema], whole: Schema) -> str:
    lines = ["| key | default | meaning |", "|---|---|---|"]
    for key, below in keys.items():
        node = resolved(below, whole)
        words = below.get("description") or node.get("description") or ""
        if "enum" in below:
            words = f"one of {', '.join(map(str, below['enum']))}" + (f"; {words}" if words else "")
        if "const" in below:
            default = f"`{below['const']}`"
        else:
            default = f"`{json.dumps(below['default'])}`" if "default" in below else "required"
        cells = (f"`{key}`", default, " ".join(words.split()))
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"
