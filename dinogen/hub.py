"""Addresses of the hub, ``hf://user/name``: parsed, downloaded into its cache, pinned to a commit.

They may stand wherever a path of weights, of a run or of data may. The network is used only where
the cache of huggingface_hub does not know the answer; HF_HUB_OFFLINE, HF_ENDPOINT, HF_HOME and
HF_TOKEN (or ``hf auth login``) mean what they mean everywhere.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from dinogen.config import Config, ConfigError, load_config, parse_config
from dinogen.runs.layout import CONFIG, EXPORTED_SUFFIX, has_stages
from dinogen.version import __version__

log = logging.getLogger(__name__)

# In a published repository.
WEIGHTS, CARD = f"model{EXPORTED_SUFFIX}", "README.md"

SCHEME = "hf://"
_EXAMPLE = "hf://user/name, hf://user/name@revision/file or hf://datasets/user/name/folder"
# pathlib makes one slash of two
_SCHEME = re.compile(r"hf:/{1,2}")
_ADDRESS = re.compile(
    r"hf:/{1,2}(?P<dataset>datasets/)?(?P<repo>[^/@]+/[^/@]+)"
    r"(?:@(?P<revision>refs/(?:pr|convert)/[^/]+|[^/]+))?(?:/(?P<subpath>.*))?"
)
# as the hub itself demands
_REPO = re.compile(r"(?!.*(?:--|\.\.))[\w.-]{1,96}/[\w.-]{1,96}")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_NOT_A_MODEL = ("spaces", "models", "datasets", "kernels", "buckets")
# Every repository of the hub has it, and it is small: with it, the cache learns the commit.
_SMALLEST = ".gitattributes"


class HubError(ConfigError):
    """Something on the hub is not available; the message says what to do."""


@dataclass(frozen=True)
class Address:
    """A repository of the hub at a revision, or a file or folder in it.

    Attributes:
        repo: ``user/name``.
        dataset: whether it is a repository of data, and not of a model.
        revision: commit, tag or branch; None for the main branch.
        subpath: of the file or folder; empty for all of it.
    """

    repo: str
    dataset: bool = False
    revision: str | None = None
    subpath: str = ""

    def __str__(self) -> str:
        kept = self.revision or ""
        at = f"@{kept if kept.startswith('refs/') else quote(kept, safe='')}" if kept else ""
        below = f"/{self.subpath}" if self.subpath else ""
        return f"{SCHEME}{'datasets/' if self.dataset else ''}{self.repo}{at}{below}"

    @property
    def kind(self) -> str:
        """What the hub's client calls ``repo_type``."""
        return "dataset" if self.dataset else "model"

    @property
    def pinned(self) -> bool:
        """Whether its revision is a commit, which cannot move."""
        return self.revision is not None and _COMMIT.fullmatch(self.revision) is not None


@dataclass(frozen=True)
class Fetched:
    """What was downloaded, or was in the cache already.

    Attributes:
        path: the file or folder.
        commit: 40 hex digits.
    """

    path: Path
    commit: str


def is_address(path: Path | str) -> bool:
    """Whether a path is an address of the hub; a folder named ``hf:`` has to be ``./hf:``."""
    return _SCHEME.match(str(path)) is not None


def parse(path: Path | str) -> Address:
    """The parts of ``hf://[datasets/]user/name[@revision][/subpath]``.

    A ``/`` in a revision is written ``%2F``, except in ``refs/pr/1``.

    Raises:
        HubError: it is malformed.
    """
    found = _ADDRESS.fullmatch(str(path))
    text = _SCHEME.sub(SCHEME, str(path), count=1)
    if found is None:
        raise HubError(f"{text}: not an address of the hub: write {_EXAMPLE}")
    repo, subpath = found["repo"], (found["subpath"] or "").strip("/")
    if not _REPO.fullmatch(repo) or repo.partition("/")[0] in _NOT_A_MODEL:
        raise HubError(f"{text}: {repo!r} cannot be the name of a repository: write {_EXAMPLE}")
    if subpath and any(part in ("", ".", "..") for part in subpath.split("/")):
        raise HubError(f"{text}: {subpath!r} is no path in a repository: write {_EXAMPLE}")
    revision = found["revision"]
    return Address(repo, found["dataset"] is not None, revision and unquote(revision), subpath)


def fetch(address: Address, files: Sequence[str] | None = None) -> Fetched:
    """Download what an address names, unless the cache has it.

    Each file is downloaded by one process of those that share a cache: the others wait at a lock of
    its own, so all ranks of a node may call this. What is pinned and in the cache needs no network.

    Args:
        address: of a file, or of a folder.
        files: patterns of what is needed of the folder, such as ``*.safetensors``; all of it
            unless given. That files are there which match is not checked.

    Raises:
        HubError: it is not available.
    """
    from huggingface_hub import snapshot_download

    below = f"{address.subpath}/" if address.subpath else ""
    patterns = [f"{below}{name}" for name in files] if files is not None else None
    if below and files is None:
        patterns = [address.subpath, f"{below}*"]
    with _explained(address), quiet("_snapshot_download"):
        snapshot = Path(
            snapshot_download(
                address.repo,
                repo_type=address.kind,
                revision=address.revision,
                allow_patterns=patterns,
                library_name="dinogen",
                library_version=__version__,
            )
        )
    path = snapshot / address.subpath
    if not path.exists() and address.subpath and files is None:
        whole = replace(address, subpath="")
        raise HubError(
            f"{address}: {whole} has no file or folder {address.subpath} (commit {snapshot.name}): "
            f"see what is there: {page_of(address)}/tree/{snapshot.name}"
        )
    return Fetched(path, snapshot.name)


def local_path(path: Path | str, key: str) -> Path:
    """A path of this machine as it is, expanded; what an address names is downloaded.

    Args:
        path: of a file or folder.
        key: of the config that holds it, which errors name.

    Raises:
        HubError: it is not available.
    """
    if not is_address(path):
        return Path(path).expanduser()
    try:
        return fetch(parse(path)).path
    except HubError as error:
        raise HubError(f"{key}: {error}") from error


def parse_section(path: str, revision: str | None, key: str) -> Address:
    """The address in a section that has a key ``revision`` too.

    Args:
        path: an address.
        revision: the other key; None if it is not given.
        key: of the address, such as ``guide.path``.

    Raises:
        HubError: it is malformed, or both name a revision.
    """
    try:
        address = parse(path)
    except HubError as error:
        raise HubError(f"{key}: {error}") from None
    if revision is None:
        return address
    if address.revision is not None:
        raise HubError(
            f"{key}: {address} and {key.rpartition('.')[0]}.revision={revision} both name a "
            "revision: leave one of them out"
        )
    return replace(address, revision=revision)


def local_weights(path: Path | str) -> Path:
    """The exported file or the run that an address stands for; other paths stay as they are.

    Of a repository or folder, ``model.safetensors`` is taken, as ``dinogen publish`` writes it.
    Without one, a run is, with its config.yaml and its stages.

    Raises:
        HubError: it is not available, or holds neither.
    """
    if not is_address(path):
        return Path(path)
    address = parse(path)
    if address.subpath.endswith(EXPORTED_SUFFIX):
        return fetch(address).path
    found = fetch(address, [WEIGHTS, CONFIG])
    if (found.path / WEIGHTS).is_file():
        return found.path / WEIGHTS
    pinned = replace(address, revision=found.commit)
    if (found.path / CONFIG).is_file():
        folder = fetch(pinned, [CONFIG, "[1-9]*x*/*"]).path
        if has_stages(folder):
            return folder
    raise HubError(
        f"{address}: holds no generator of dinogen, neither {WEIGHTS} nor a run ({CONFIG} beside "
        f"64x64/checkpoints): name the file or folder, as in {_EXAMPLE}; weights of others become "
        "a run by `dinogen import`"
    )


def working_path(path: Path | str) -> Path:
    """As :func:`local_weights`, for commands that write results beside what they read.

    Nothing is written into the hub's cache: a run from there gets a folder of links in the current
    folder, ``user--name-COMMIT``. Results of a file go there too, see :func:`cached_name`.

    Raises:
        HubError: see :func:`local_weights`.
    """
    found = local_weights(path)
    if not is_address(path) or found.is_file():
        return found
    name = cached_name(found)
    assert name is not None
    folder = Path(name)
    for file in sorted(found.rglob("*")):
        link = folder / file.relative_to(found)
        if file.is_file() and not os.path.lexists(link):
            link.parent.mkdir(parents=True, exist_ok=True)
            with suppress(FileExistsError):  # another rank has just made it
                link.symlink_to(file.resolve())
    log.info("%s is in %s, and so is what is made of it", path, folder)
    return folder


def cached_address(path: Path) -> Address | None:
    """What a path in the hub's cache is a copy of, pinned; None for any other path."""
    parts = path.absolute().parts
    for number, part in enumerate(parts[:-2]):
        kind, *names = part.split("--")
        if parts[number + 1] == "snapshots" and kind in ("models", "datasets") and len(names) == 2:
            commit, *below = parts[number + 2 :]
            return Address("/".join(names), kind == "datasets", commit, "/".join(below))
    return None


def code_of(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Each key that names a Python file of one's own, with the file.

    Args:
        config: as it was read, unchecked.
    """
    guides = config.get("guides")
    sections = {name: config.get(name) for name in ("family", "guide")}
    sections |= {f"guides.{k}": v for k, v in guides.items()} if isinstance(guides, Mapping) else {}
    for name, section in sections.items():
        if isinstance(section, Mapping) and section.get("file") is not None:
            yield f"{name}.file", str(section["file"])


def refuse_code(config: Mapping[str, Any], source: Path) -> None:
    """Refuse a config from the hub that names Python files: to use it would run them.

    Args:
        config: as it was read, unchecked.
        source: the file or folder that it was read from; elsewhere than from the hub, configs may.

    Raises:
        HubError: it names one.
    """
    if not in_cache(source):
        return
    for key, file in code_of(config):
        raise HubError(
            f"{shown(source)}: {key} names Python code, {file}, and nothing was run: read that "
            "code first; if you trust it, copy the download out of the hub's cache and use the copy"
        )


def in_cache(path: Path) -> bool:
    """Whether a path is in the hub's cache, or is a link that leads there."""
    return any(
        one.startswith(("models--", "datasets--")) and two in ("snapshots", "blobs")
        for parts in (path.absolute().parts, path.resolve().parts)
        for one, two in pairwise(parts)
    )


def cached_name(path: Path) -> str | None:
    """``user--name-0123456`` for a path in the hub's cache; None for any other.

    Seven digits of the commit keep results of other weights apart.
    """
    address = cached_address(path)
    if address is None:
        return None
    folders = [one for one in address.subpath.split("/") if one and one != WEIGHTS]
    below = "".join(f"-{one.removesuffix(EXPORTED_SUFFIX)}" for one in folders)
    return f"{address.repo.replace('/', '--')}-{(address.revision or '')[:7]}{below}"


def shown(path: Path | str) -> str:
    """A path as a command takes it on other machines too: that of the cache as its address."""
    address = parse(path) if is_address(path) else cached_address(Path(path))
    return str(path) if address is None else str(address)


def page_of(address: Address) -> str:
    """Its page, for people."""
    from huggingface_hub import constants

    return f"{constants.ENDPOINT}/{'datasets/' if address.dataset else ''}{address.repo}"


# ---- pins ----------------------------------------------------------------------------------------


def pinned(config: Config, resolve: bool = True) -> Config:
    """The config with the commits of :func:`find_pins`, so that a run keeps its weights."""
    return with_pins(config, find_pins(config, resolve))


def find_pins(config: Config, resolve: bool = True) -> dict[str, str]:
    """The commit of every address of the hub in a config, by its dotted key.

    A run that has begun keeps the commits that its config.yaml names, however its branches have
    moved since. An address with a revision of its own is taken at that one, and a warning says
    whether it has moved.

    Args:
        config: of a run.
        resolve: whether to ask the hub; otherwise only what the run has pinned is found.

    Returns:
        Nothing for an address whose commit is not known now, with a warning: what needs it will
        say why it is not available.

    Raises:
        HubError: an address is malformed.
    """
    found = {}
    addresses = list(_addresses(config.model_dump(mode="json")))
    before = _read_before(config) if addresses else {}
    for section, name, key in addresses:
        asked = parse_section(section[name], _separate(section), key)
        commit = _commit_now(asked, before.get(key), key, resolve)
        if commit is not None:
            found[key] = commit
    return found


def with_pins(config: Config, pins: Mapping[str, str]) -> Config:
    """The config with each address at its commit.

    Args:
        config: of a run.
        pins: of :func:`find_pins`; the commit goes into the address, or into the key
            ``revision`` beside it where that is given.
    """
    if not pins:
        return config
    data = config.model_dump(mode="json")
    for section, name, key in list(_addresses(data)):
        if key not in pins:
            continue
        if _separate(section) is not None:
            section["revision"] = pins[key]
        else:
            section[name] = str(replace(parse(section[name]), revision=pins[key]))
    return parse_config(data).model_copy(update={"run": config.run})


def _addresses(section: Any, prefix: str = "") -> Iterator[tuple[Any, Any, str]]:
    """The sections of a dumped config that hold an address, its name there, and its dotted key."""
    items = section.items() if isinstance(section, dict) else enumerate(section)
    for name, value in items:
        if isinstance(value, (dict, list)):
            if prefix or name != "notes":
                yield from _addresses(value, f"{prefix}{name}.")
        elif isinstance(value, str) and value.startswith(SCHEME):
            yield section, name, f"{prefix}{name}"


def _read_before(config: Config) -> dict[str, Address]:
    """The addresses in the config.yaml of a run that has begun, by their keys."""
    file = config.run / CONFIG
    try:
        if not file.is_file() or not has_stages(config.run):
            return {}
        data = load_config(file).model_dump(mode="json")
    except (ConfigError, OSError):
        return {}  # training says what is wrong with it
    found = {}
    for section, name, key in _addresses(data):
        found[key] = parse_section(section[name], _separate(section), key)
    return found


def _separate(section: Any) -> str | None:
    """The key ``revision`` of a section; lists have none."""
    return section.get("revision") if isinstance(section, dict) else None


def _commit_now(asked: Address, before: Address | None, key: str, resolve: bool) -> str | None:
    """The commit to use; None if it is not known."""
    if asked.pinned:
        return asked.revision
    known = None
    if before is not None and before.pinned and replace(before, revision=asked.revision) == asked:
        known = before.revision
    if known is not None and asked.revision is None:
        log.info("%s: %s stays at commit %s, with which this run began", key, asked, known)
        return known
    if not resolve:
        return None
    try:
        commit = fetch(replace(asked, subpath=""), [_SMALLEST]).commit
    except HubError as error:
        found = _cached_commit(asked)
        if found is None:
            log.warning("NOT PINNED: %s: %s", key, error)
        return found
    if known not in (None, commit):
        log.warning(
            "MOVED: %s: %s was commit %s when this run began, and is %s now",
            key, asked, known, commit,
        )  # fmt: skip
    return commit


def _cached_commit(address: Address) -> str | None:
    """The commit that the cache knows for a branch; its smallest file may never have been read."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    name = repo_folder_name(repo_id=address.repo, repo_type=address.kind)
    folder = Path(constants.HF_HUB_CACHE) / name
    try:
        commit = (folder / "refs" / (address.revision or "main")).read_text().strip()
    except OSError:
        return None
    return commit if _COMMIT.fullmatch(commit) else None


# ---- errors --------------------------------------------------------------------------------------


@contextmanager
def quiet(module: str) -> Iterator[None]:
    """Leave out what a module of huggingface_hub logs below an error, which we say ourselves."""
    logger = logging.getLogger(f"huggingface_hub.{module}")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


@contextmanager
def _explained(address: Address) -> Iterator[None]:
    """What huggingface_hub raises, as one line that says what to do."""
    try:
        yield
    except Exception as error:  # its client raises many types, and those of its HTTP library
        raise HubError(f"{address}: {reason(error, address)}") from error


def reason(error: Exception, address: Address, upload: bool = False) -> str:
    """Why a request to the hub failed, and what to do about it, in one line.

    Args:
        error: what its client raised.
        address: of the request.
        upload: whether something was to be written there.
    """
    from huggingface_hub import constants, errors

    cached = isinstance(error, errors.LocalEntryNotFoundError)
    cause = error.__cause__ if cached and isinstance(error.__cause__, Exception) else error
    status = getattr(getattr(cause, "response", None), "status_code", None)
    login = "log in with `hf auth login`, or set HF_TOKEN"
    if isinstance(cause, errors.HFValidationError):
        return f"{_line(cause)}: write {_EXAMPLE}"
    if upload and (isinstance(cause, errors.RepositoryNotFoundError) or status in (401, 403)):
        return (
            f"the hub does not let you write to {address.repo}: {login}, with a token that may "
            "write, and check the name"
        )
    if isinstance(cause, errors.GatedRepoError):
        return f"access has to be granted: accept its terms on {page_of(address)}, then {login}"
    if isinstance(cause, errors.RepositoryNotFoundError):
        return f"no such repository, or a private one: check the name; if it is private, {login}"
    if isinstance(cause, errors.RevisionNotFoundError):
        return (
            f"it has no revision {address.revision or 'main'}: give a commit, tag or branch that "
            f"{page_of(address)} lists"
        )
    if status in (401, 403):
        return f"the hub refuses ({_line(cause)}): {login}, with a token that may do this"
    if upload:
        if isinstance(cause, errors.OfflineModeIsEnabled) or constants.HF_HUB_OFFLINE:
            return "HF_HUB_OFFLINE is set: unset it"
        return f"the hub at {constants.ENDPOINT} failed ({_line(cause)}): try again"
    elsewhere = f"`hf download {address.repo}` on a machine with network, and copy its cache here"
    if isinstance(cause, errors.OfflineModeIsEnabled) or constants.HF_HUB_OFFLINE:
        return f"not in the cache, and HF_HUB_OFFLINE is set: unset it, or run {elsewhere}"
    if isinstance(cause, OSError) and cause.errno is not None and cause.filename is not None:
        return f"cannot be written ({cause.strerror}: {cause.filename}): set HF_HOME elsewhere"
    return (
        f"cannot be downloaded from {constants.ENDPOINT} ({_line(cause)}): try again, or run "
        f"{elsewhere}"
    )


def _line(error: BaseException) -> str:
    """The first line of an error's text, or its type."""
    lines = str(error).strip().splitlines()
    return lines[0].strip().rstrip(".:") if lines else type(error).__name__
