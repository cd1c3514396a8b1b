"""Checkpoint folders: found on disk, in the hub's cache or downloaded, then loaded and hashed."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dinogen import hub
from dinogen.features.base import GuideError
from dinogen.files import weights_sha256


@contextmanager
def damage_as_guide_error(key: str, path: str) -> Iterator[None]:
    """Turn what transformers and safetensors raise on damaged files into a GuideError.

    Args:
        key: of the config that names the checkpoint.
        path: as the user wrote it there.
    """
    try:
        yield
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()
        raise GuideError(
            f"{key}: {path} is damaged ({reason[0] if reason else repr(error)}): download the "
            "whole checkpoint again"
        ) from error


def read_model(
    network: Any, folder: Path, config: Any, key: str, path: str, **arguments: Any
) -> Any:
    """The network in float32, only from safetensors; no missing weight is initialised randomly.

    Args:
        network: class of transformers.
        folder: of the checkpoint.
        config: transformers' own, read from the folder.
        key: as in :func:`damage_as_guide_error`.
        path: as in :func:`damage_as_guide_error`.
        arguments: of the class, or others than here of ``from_pretrained``.

    Raises:
        GuideError: weights are missing or of another shape than the config says.
    """
    with quiet_transformers():
        model, report = network.from_pretrained(
            folder,
            config=config,
            local_files_only=True,
            use_safetensors=True,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, in one line
            **{"attn_implementation": "sdpa", **arguments},
        )
    if report["missing_keys"]:
        raise missing_weights(key, path, sorted(report["missing_keys"]))
    if report["mismatched_keys"]:
        raise wrong_shape(key, path, *min(report["mismatched_keys"]))
    return model


def missing_weights(key: str, path: str, names: Sequence[str]) -> GuideError:
    """The error for a checkpoint that lacks weights of these names."""
    return GuideError(
        f"{key}: {path} lacks {len(names)} weights ({', '.join(names[:3])}, ...): download "
        "the whole checkpoint again"
    )


def wrong_shape(
    key: str, path: str, name: str, stored: Iterable[int], wanted: Iterable[int]
) -> GuideError:
    """The error for a checkpoint with a weight of another shape than its config says."""
    return GuideError(
        f"{key}: {path} is damaged ({name} is {list(stored)}, but config.json says "
        f"{list(wanted)}): download the whole checkpoint again"
    )


def hash_folder(folder: Path, pattern: str, further: Mapping[str, Tensor] | None = None) -> str:
    """Hash of the weights as stored on disk, independent of renames by transformers.

    Args:
        folder: of the checkpoint.
        pattern: of its files.
        further: what the features depend on besides the weights.
    """
    tensors: dict[str, Tensor] = dict(further or {})
    for file in sorted(folder.glob(pattern)):
        tensors.update(load_file(file))
    return weights_sha256(tensors)


_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_PROBE_SECONDS = 4.0


@dataclass(frozen=True)
class Wanted:
    """What is searched, and how errors name it.

    Attributes:
        key: of the config that names the checkpoint.
        example: a valid hub name.
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
        path: local folder, address of the hub (``hf://user/name``, a folder in it too), or hub
            name (a folder of that name wins).
        revision: hub commit, tag or branch.
        wanted: the key of the config, and the files.

    Returns:
        The folder, and the hub commit (None for a local folder).

    Raises:
        GuideError: it is not available; the message says what to do.
    """
    if hub.is_address(path):
        return _of_address(path, revision, wanted)
    folder = Path(path).expanduser()
    if folder.is_file():
        raise GuideError(f"{wanted.key}: {path} is a file: give the folder that contains it")
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
    except Exception as error:  # the hub's client raises many types
        reason = str(error).strip().splitlines()
        why = reason[0] if reason else repr(error)
        raise GuideError(_not_available(path, revision, why, wanted.key)) from error
    if not _is_checkpoint(folder):
        why = "only a part of it is in the cache, or it has no *.safetensors"
        raise GuideError(_not_available(path, revision, why, wanted.key))
    return folder, folder.name


def _of_address(path: str, revision: str | None, wanted: Wanted) -> tuple[Path, str]:
    """As :func:`checkpoint_folder`, of ``hf://user/name``."""
    try:
        address = hub.parse_section(path, revision, wanted.key)
        found = hub.fetch(address, wanted.files)
    except hub.HubError as error:
        text = str(error).removeprefix(f"{wanted.key}: ")
        raise GuideError(f"{wanted.key}: {text}") from error
    if not _is_checkpoint(found.path):
        raise GuideError(
            f"{wanted.key}: {path} lacks config.json or *.safetensors (commit {found.commit}): "
            f"name a whole checkpoint, such as hf://{wanted.example}"
        )
    return found.path, found.commit


def weights_reachable(path: str, revision: str | None = None) -> str | None:
    """Whether a checkpoint could be loaded, without loading or downloading it.

    Answers within about five seconds even if the network hangs, and honours HF_HUB_OFFLINE.

    Returns:
        ``"local folder"``, ``"hub cache"`` or ``"hub"``; None if it is not available.
    """
    if hub.is_address(path):
        address = hub.parse_section(path, revision, GUIDE.key)
    else:
        folder = Path(path).expanduser()
        if folder.is_dir():
            return "local folder" if _is_checkpoint(folder) else None
        if folder.is_file() or not _HUB_NAME.fullmatch(path):
            return None
        address = hub.Address(path, revision=revision)
    from huggingface_hub import constants, snapshot_download

    below = f"{address.subpath}/" if address.subpath else ""
    try:
        cached = snapshot_download(
            address.repo,
            repo_type=address.kind,
            revision=address.revision,
            allow_patterns=[f"{below}{name}" for name in GUIDE.files],
            local_files_only=True,
        )
        if _is_checkpoint(Path(cached) / below):
            return "hub cache"
    except (OSError, ValueError):
        pass  # not cached: the network may still have it
    if constants.HF_HUB_OFFLINE:
        return None
    return "hub" if _hub_answers(address) else None


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Turn off transformers' own progress bars, which disturb those of the CLI, and its warnings.

    It warns of missing keys and wrong shapes when it loads; we raise those as one error line.
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


def _hub_answers(address: hub.Address) -> bool:
    """One HEAD request; in a thread, because resolving a name can hang beyond any timeout."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    found = []

    def ask() -> None:
        try:
            url = hf_hub_url(
                address.repo,
                "config.json",
                subfolder=address.subpath,
                repo_type=address.kind,
                revision=address.revision,
            )
            found.append(get_hf_file_metadata(url, timeout=_PROBE_SECONDS))
        except Exception:  # the hub's client raises many types; all mean that it is not available
            pass

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_PROBE_SECONDS)
    return bool(found)


def _not_available(path: str, revision: str | None, reason: str, key: str) -> str:
    at = f" at revision {revision}" if revision else ""
    return (
        f"{key}: {path}{at}: there is no folder of that name, and it cannot be downloaded from "
        f"the hub ({reason}): set {key} to a checkpoint's folder, or on a machine with network run "
        f"`hf download {path} --local-dir {Path(path).name}` and copy that folder here"
    )
