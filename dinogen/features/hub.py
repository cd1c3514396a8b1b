"""Checkpoint folders: from disk, from the Hugging Face cache, or downloaded from its hub."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from dinogen.features.base import GuideError

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_PROBE_SECONDS = 4.0


@dataclass(frozen=True)
class Wanted:
    """What is looked for, and how errors speak of it.

    Attributes:
        key: of the config that names the checkpoint.
        example: a hub name that would do.
        files: patterns of what is downloaded.
    """

    key: str = "guide.path"
    example: str = "facebook/dinov2-small"
    files: tuple[str, ...] = ("config.json", "*.safetensors", "*.safetensors.index.json")


GUIDE = Wanted()


def checkpoint_folder(
    path: str, revision: str | None, wanted: Wanted = GUIDE
) -> tuple[Path, str | None]:
    """The folder with ``config.json`` and safetensors that a config names.

    Args:
        path: local folder, or hub name (a folder of that name wins).
        revision: hub commit, tag or branch.
        wanted: by which key of the config, and for what.

    Returns:
        The folder, and the hub commit (None for a local folder).

    Raises:
        GuideError: it cannot be had; the message says what to do.
    """
    folder = Path(path).expanduser()
    if folder.is_file():
        raise GuideError(f"{wanted.key}: {path} is a file: give the folder it lies in")
    if folder.is_dir():
        if not _is_checkpoint(folder):
            raise GuideError(
                f"{wanted.key}: {path} lacks config.json or *.safetensors: give the folder of a "
                "whole checkpoint, as `hf download` or save_pretrained writes it"
            )
        return folder, None
    if not _HUB_NAME.fullmatch(path):
        raise GuideError(
            f"{wanted.key}: {path} is neither a folder nor a hub name such as {wanted.example}"
        )
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(path, revision=revision, allow_patterns=list(wanted.files)))
    except Exception as error:  # the hub's client raises many kinds; all mean this
        reason = str(error).strip().splitlines()
        why = reason[0] if reason else repr(error)
        raise GuideError(_cannot_have(path, revision, why, wanted.key)) from error
    if not _is_checkpoint(folder):
        why = "only a part of it is in the cache, or it has no *.safetensors"
        raise GuideError(_cannot_have(path, revision, why, wanted.key))
    return folder, folder.name


def weights_reachable(path: str, revision: str | None = None) -> str | None:
    """Whether a checkpoint could be loaded, without loading or downloading it.

    Answers within about five seconds whatever the network does, and honours HF_HUB_OFFLINE.

    Returns:
        ``"local folder"``, ``"hub cache"`` or ``"hub"``; None if it cannot be had.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return "local folder" if _is_checkpoint(folder) else None
    if folder.is_file() or not _HUB_NAME.fullmatch(path):
        return None
    from huggingface_hub import constants, snapshot_download

    try:
        cached = snapshot_download(
            path, revision=revision, allow_patterns=list(GUIDE.files), local_files_only=True
        )
        if _is_checkpoint(Path(cached)):
            return "hub cache"
    except (OSError, ValueError):
        pass  # not cached: the network may still have it
    if constants.HF_HUB_OFFLINE:
        return None
    return "hub" if _hub_answers(path, revision) else None


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without transformers' own progress bars, which tear those of the CLI, and its warnings.

    What it warns of when it loads, keys and shapes that do not fit, is our error in one line.
    """
    from transformers.utils import logging

    enabled, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if enabled:
            logging.enable_progress_bar()


def _is_checkpoint(folder: Path) -> bool:
    return (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))


def _hub_answers(path: str, revision: str | None) -> bool:
    """One HEAD request; in a thread, because resolving a name can hang beyond any timeout."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    found = []

    def ask() -> None:
        try:
            url = hf_hub_url(path, "config.json", revision=revision)
            found.append(get_hf_file_metadata(url, timeout=_PROBE_SECONDS))
        except Exception:  # the hub's client raises many kinds; all mean: it cannot be had
            pass

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_PROBE_SECONDS)
    return bool(found)


def _cannot_have(path: str, revision: str | None, reason: str, key: str) -> str:
    at = f" at revision {revision}" if revision else ""
    return (
        f"{key}: {path}{at}: no folder of that name here, and the hub does not give it "
        f"({reason}): set {key} to a checkpoint's folder, or on a machine with network run "
        f"`hf download {path} --local-dir {Path(path).name}`, and copy that folder here"
    )
