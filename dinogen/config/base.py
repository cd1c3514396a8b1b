"""What every section of a config is, and what is said of a key that is wrong."""

from __future__ import annotations

import difflib
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails


class Section(BaseModel):
    """One mapping of the YAML file; refuses keys that it does not declare."""

    model_config = ConfigDict(extra="forbid", validate_default=True)


def describe_errors(error: ValidationError, model: type[BaseModel], source: str) -> str:
    """Pydantic's errors as one line each: ``source: key: what is wrong and the mend``."""
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
            lines.append(f"{source}: {key + ': ' if key else ''}{_say(item)}")
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
    """Whether a list is too short only because its invalid members, named too, do not count."""
    depth = len(item["loc"])
    return item["type"] == "too_short" and any(
        len(other["loc"]) > depth and other["loc"][:depth] == item["loc"] for other in items
    )


def _say(item: ErrorDetails) -> str:
    """What is wrong with a value, in the words of a YAML file."""
    given = item["input"]
    if item["type"] == "missing":
        return "is missing: give it a value"
    if item["type"] == "model_type":
        what = "is empty" if given is None else f"holds {given!r}"
        return f"{what}, but is a section: indent its keys below it, or leave it out"
    if item["type"] == "tuple_type":
        return f"has to be a list, not {given!r}"
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
        elif kinds := node.get("discriminator", {}).get("mapping"):  # its name says which it is
            node = {"$ref": kinds.get(part, "")}
        else:  # a mapping of any names says what each of them holds
            node = node.get("properties", {}).get(part) or node.get("additionalProperties") or {}
        choices = [node, *node.get("allOf", []), *node.get("anyOf", [])]
        reference = next((one["$ref"] for one in choices if "$ref" in one), None)
        if reference:
            node = schema["$defs"].get(reference.rsplit("/", 1)[-1], {})
    return list(node.get("properties", {}))
