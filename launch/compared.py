"""What `dinogen compare` was given: folders of runs, folders of configs, and changes of keys."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from dinogen.config import Config, load_config, parse_config
from dinogen.errors import UserError
from dinogen.report.compare_read import find_runs, is_run
from launch.study import is_study

_KEY = re.compile(r"[A-Za-z_]\w*(\.\w+)*")


def sort_words(words: Sequence[str]) -> tuple[list[Path], list[str]]:
    """Paths, and ``KEY=VALUE`` changes for evaluate.

    What exists is a path, whatever is in its name. What does not is a change only if its key is
    one of a config: a path that was mistyped is not to be passed over because it holds a "=".

    Raises:
        UserError: a word is neither; or a change is not one that a config can take.
    """
    paths, changes = [], []
    for word in words:
        key, found, _ = word.partition("=")
        if os.path.lexists(word):
            paths.append(Path(word))
        elif found and _KEY.fullmatch(key) and key.partition(".")[0] in Config.model_fields:
            changes.append(word)
        elif found and "/" not in key:
            raise UserError(
                f"{word}: no such folder, and {key!r} is no key of a config: give a folder that is "
                "there, or a change such as metrics.num_samples=10000"
            )
        else:
            raise UserError(f"{word}: no such folder: give folders of runs, or one that holds some")
    parse_config({}, changes, source="KEY=VALUE")
    return paths, changes


def folders_of(paths: Sequence[Path]) -> tuple[list[Path], list[str]]:
    """The folders of all runs that some paths stand for, each once, and what is wrong.

    Raises:
        UserError: no path holds a run.
    """
    folders: list[Path] = []
    problems: list[str] = []
    lost: list[UserError] = []
    for path in paths:
        if not is_run(path) and path.is_dir() and is_study(path):
            for file in sorted(path.glob("*.yaml")):
                try:
                    folders.append(load_config(file).run)
                except UserError as error:
                    problems.append(f"{error}\n{file}: its run is left out")
            continue
        try:
            folders += find_runs([path])
        except UserError as error:  # something is there, but no run: it is listed as damaged
            lost.append(error)
            folders.append(path)
    if len(folders) == len(lost):
        raise UserError("\n".join([*problems, *map(str, lost)]))
    return list(dict.fromkeys(folders)), problems
