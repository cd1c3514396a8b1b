"""``settings.json`` in a folder of faces: how they were cut out, and of which photos."""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dinogen.config_prepare import FacesConfig
from dinogen.files import write_json
from dinogen.prepare.read import PrepareError

SETTINGS = "settings.json"


def read_settings(folder: Path) -> tuple[dict[str, Any], tuple[str, ...]] | None:
    """Settings of the faces in a folder and names of their classes.

    Returns:
        None if ``dinogen faces`` did not write the folder.
    """
    path = folder / SETTINGS
    if not path.is_file():
        return None
    found = read_json(path)
    return found.get("faces", {}), tuple(found.get("classes", ()))


def faces_settings(config: FacesConfig) -> dict[str, Any]:
    """What decides the crops, besides the photos; JSON values."""
    # How fast the work is done does not change what comes out.
    return config.model_dump(mode="json", exclude={"batch", "num_threads"})


def todays_settings(saved: dict[str, Any]) -> dict[str, Any]:
    """What :func:`faces_settings` of an older version saved, by today's names and defaults."""
    try:
        return faces_settings(FacesConfig.model_validate(saved)) if saved else {}
    except ValidationError:
        return saved


def check_settings(src: Path, out: Path, config: FacesConfig, classes: tuple[str, ...]) -> None:
    """Write the file, or make sure that what lies there was made alike.

    Raises:
        PrepareError: the folder holds something else, or faces of other photos or settings.
    """
    settings: dict[str, Any] = {"src": str(src.resolve()), "faces": faces_settings(config)}
    if classes:
        settings["classes"] = list(classes)
    if out.exists() and not out.is_dir():
        raise PrepareError(f"{out}: is a file: choose a folder")
    path = out / SETTINGS
    if path.exists() and any(chain(out.glob("*.jpg"), out.glob("*.png"))):
        before = read_json(path)
        if before["src"] != settings["src"]:
            raise PrepareError(
                f"{out}: holds faces of other photos ({before['src']}): choose another folder; "
                f"if the photos have only moved, write their place into {path}"
            )
        old = todays_settings(before["faces"]) | {"classes of the photos": before.get("classes")}
        new = settings["faces"] | {"classes of the photos": settings.get("classes")}
        changed = [f"{k} {old.get(k)} is now {v}" for k, v in new.items() if old.get(k) != v]
        if changed:
            raise PrepareError(
                f"{out}: holds faces made with other settings ({', '.join(changed)}): choose "
                "another folder, or delete this one"
            )
    elif not path.exists() and out.exists() and any(out.iterdir()):
        raise PrepareError(
            f"{out}: is not empty and was not written by 'dinogen faces': choose another folder"
        )
    else:
        write_json(path, settings)


def read_json(path: Path) -> dict[str, Any]:
    """A file that ``dinogen faces`` wrote.

    Raises:
        PrepareError: it is missing or damaged.
    """
    try:
        value: dict[str, Any] = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise PrepareError(f"{path}: missing: delete the picture beside it and run again") from None
    except ValueError as error:
        raise PrepareError(f"{path}: not JSON ({error}): delete it and run again") from None
    return value
