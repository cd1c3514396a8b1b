"""Which guides there are: files that declare ``DEFAULT_PATH``, which are read here and not run.

A config is checked without torch, which every guide imports.
"""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

_FOLDER = Path(__file__).parents[1] / "features"
_DECLARATION = "DEFAULT_PATH"


@cache
def known_guides() -> dict[str, str | None]:
    """The guides of dinogen and the ``guide.path`` that each has where the config gives none.

    Returns:
        Names of the files in ``dinogen/features`` that declare ``DEFAULT_PATH``, and its values;
        None for a guide that reads no weights.
    """
    found = {path.stem: _declared(path) for path in sorted(_FOLDER.glob("*.py"))}
    return {name: values[0] for name, values in found.items() if values}


def default_path(name: str, file: str | None) -> str | None:
    """The ``DEFAULT_PATH`` of a guide; None if it declares none, or cannot be read.

    Args:
        name: of a guide of dinogen.
        file: of a guide of the user's own, which counts instead of the name.
    """
    if file is None:
        return known_guides().get(name)
    try:
        values = _declared(Path(file))
    except (OSError, SyntaxError, ValueError):
        return None  # loading it says what is wrong
    return values[0] if values else None


def _declared(file: Path) -> list[str | None]:
    """The value of the declaration in a file, or nothing."""
    text = file.read_text(encoding="utf-8")
    if _DECLARATION not in text:
        return []
    for node in ast.parse(text).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        names = [target.id for target in targets if isinstance(target, ast.Name)]
        if _DECLARATION in names and isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value:
            value = ast.literal_eval(node.value)
            return [value if value is None else str(value)]
    return []
