"""Publishes a run's generator on the hub, in one commit; or writes the same to a folder."""

from __future__ import annotations

import logging
import re
import shlex
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from dinogen import hub
from dinogen.config import Config, ConfigError, dump_config, parse_config
from dinogen.files import write_json, write_text
from dinogen.publish.card import SAMPLES, Facts, write_card
from dinogen.report.images import save_grid
from dinogen.runs.layout import CONFIG, EVALUATION, EXPORTED_SUFFIX, is_exported
from dinogen.runs.run import Run
from dinogen.training.checkpointing.export import (
    NO_LICENCE,
    generator_with_card,
    load_generator,
    warn_if_random,
    write_safetensors,
)
from dinogen.training.checkpointing.exported import open_exported, results_folder

log = logging.getLogger(__name__)

FILES = (hub.WEIGHTS, CONFIG, hub.CARD, SAMPLES, EVALUATION)
_GRID_PIXELS = 512


@dataclass(frozen=True)
class Publication:
    """What is published, and in which words.

    Attributes:
        run: its folder, an exported file, or the address of either.
        address: ``hf://user/name``, or ``hf://user/name@branch``.
        resolution: which stage; the largest that has a checkpoint unless given.
        nimg: which checkpoint; the newest unless given.
        licence: of the weights; unless given, that of an exported file's card. If there is none,
            the new card says it.
        intended_use: for the card; unless given, that of the file's card, or ``INTENDED_USE``.
    """

    run: Path
    address: hub.Address
    resolution: int | None = None
    nimg: int | None = None
    licence: str | None = None
    intended_use: str | None = None


@dataclass(frozen=True)
class Published:
    """What the hub holds now.

    Attributes:
        url: of the repository's page.
        commit: of its files.
        before: the commit before; None in a new repository or on a new branch.
    """

    url: str
    commit: str
    before: str | None


def check_address(address: hub.Address) -> None:
    """Refuse what cannot be published to.

    Raises:
        HubError: a dataset, a part of a repository, or a commit.
    """
    if address.dataset or address.subpath:
        raise hub.HubError(f"{address}: a generator gets a repository: write hf://user/name")
    if address.pinned:
        raise hub.HubError(f"{address}: a commit cannot change: name a branch, or leave it out")


def write_publication(what: Publication, folder: Path) -> Facts:
    """Write all that is published into a folder: the files of :data:`FILES`.

    ``model.safetensors`` is the file of ``dinogen export``. In its config and in config.yaml, paths
    of this machine are only names, URLs have no user and no query, and the sections ``cluster`` and
    ``logging`` are left out. The grid is drawn from the file that is published, so a file that does
    not load is never published.

    Args:
        what: of which checkpoint.
        folder: a new or an empty one, or one of an earlier call, whose files are replaced.

    Returns:
        What the card says.

    Raises:
        ConfigError: no such run or checkpoint, its family or guide is a file of one's own, or the
            folder holds something else. Or its autoencoder is on this machine alone.
    """
    check_address(what.address)
    _check_folder(folder)
    source = hub.local_weights(what.run)
    if is_exported(source):
        _refuse_own_code(open_exported(source).info["config"])
    elif Run(source).has_config:
        _refuse_own_code(Run(source).config.model_dump())
    generator = generator_with_card(
        source, what.resolution, what.nimg, what.licence or None, what.intended_use
    )
    _refuse_own_code(generator.info["config"])
    _refuse_own_autoencoder(generator.info)
    card = generator.info["card"]
    licence, use = card["licence"], card["intended_use"].rstrip(". ")
    config = public_config(parse_config(generator.info["config"]), what.address)
    info: dict[str, Any] = _shortened(generator.info | {"config": config.model_dump(mode="json")})
    info["card"] |= {"licence": licence, "intended_use": use}
    if "imported" not in info:
        info["card"]["data"] = config.data.location
    weights = folder / hub.WEIGHTS
    write_safetensors(replace(generator, info=info), weights)
    warn_if_random(generator, weights)
    if licence == NO_LICENCE:
        log.warning(
            "NO LICENCE: the card says that none is stated, so nobody may use the weights: give "
            "--licence"
        )
    if "imported" in info:
        log.warning(
            "IMPORTED: the licence of %s applies: check that it lets you publish its weights",
            info["imported"]["file"],
        )
    evaluation = _evaluation(source, info)
    facts = Facts(
        name=what.address.repo.partition("/")[2],
        address=what.address,
        info=info,
        config=config,
        evaluation=evaluation or _evaluation_of_card(card),
        has_file=evaluation is not None,
        num_parameters=generator.num_parameters,
        licence=None if licence == NO_LICENCE else licence,
        intended_use=use,
    )
    columns = max(4, min(8, _GRID_PIXELS // info["resolution"]))
    about = {"generator": str(what.address), "nimg": info["nimg"], "seed": 0}
    images = load_generator(weights).sample(columns**2, seed=0).numpy()
    save_grid(images, folder / SAMPLES, columns, about=about)
    write_text(folder / CONFIG, dump_config(config))
    if evaluation is None:
        (folder / EVALUATION).unlink(missing_ok=True)
    else:
        write_json(folder / EVALUATION, evaluation)
    write_text(folder / hub.CARD, write_card(facts))
    return facts


def publish(what: Publication, private: bool = False, message: str | None = None) -> Published:
    """Upload what :func:`write_publication` writes, in one commit; nothing is asked.

    The repository and the branch are made where they are not there. Published again, our files are
    replaced, and one that is not written any more is deleted; files of others stay.

    Args:
        what: of which checkpoint, and where.
        private: make the repository private.
        message: of the commit.

    Raises:
        HubError: the hub cannot be reached, or refuses; or ``private`` is asked of a repository
            that is public.
        ConfigError: no such run or checkpoint.
    """
    check_address(what.address)
    with TemporaryDirectory(prefix="dinogen-publish-") as name:
        facts = write_publication(what, Path(name))
        said = message or f"{facts.info['family']} {facts.size} at {facts.info['nimg']} images"
        try:
            with hub.quiet("hf_api"):
                return _upload(what.address, Path(name), private, said)
        except hub.HubError:
            raise
        except Exception as error:  # the hub's client raises many types
            why = hub.reason(error, what.address, upload=True)
            raise hub.HubError(f"{what.address}: nothing was published: {why}") from error


def _upload(address: hub.Address, folder: Path, private: bool, message: str) -> Published:
    """One commit with all files of a folder."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi(library_name="dinogen")
    api.create_repo(address.repo, private=private or None, exist_ok=True)
    if private and not api.model_info(address.repo).private:
        raise hub.HubError(
            f"{address}: --private, but this repository is public already: make it private in its "
            f"settings ({hub.page_of(address)}/settings), or publish under another name"
        )
    branch = address.revision or "main"
    if address.revision is not None:
        api.create_branch(address.repo, branch=branch, exist_ok=True)
    found = api.model_info(address.repo, revision=branch)
    there = {one.rfilename for one in found.siblings or []}
    operations: list[Any] = [
        CommitOperationAdd(one.name, str(one)) for one in sorted(folder.iterdir())
    ]
    stale = there.intersection(FILES) - {one.path_in_repo for one in operations}
    operations += [CommitOperationDelete(name) for name in sorted(stale)]
    done = api.create_commit(
        address.repo, operations, commit_message=message, revision=branch, parent_commit=found.sha
    )
    published_before = hub.WEIGHTS in there
    return Published(hub.page_of(address), done.oid, found.sha if published_before else None)


def public_config(config: Config, address: hub.Address) -> Config:
    """A config for others: paths shortened to their names, no passwords, no cluster."""
    data = config.model_dump(mode="json", exclude=_PRIVATE)
    data["run"] = f"runs/{address.repo.partition('/')[2]}"
    return parse_config(_shortened(data))


# Sections that hold accounts and addresses of servers, with their passwords.
_PRIVATE = {"cluster", "logging"}
_ROOT = r"(?:~[\w.-]*|\.\.)?/"
# A URL, or the folders of a path that begins at the root, at a home or above the current folder.
_PLACE = re.compile(
    r"(?P<scheme>\b[A-Za-z][A-Za-z0-9+.-]*)://(?P<rest>[^\s'\"]*)|(?P<hub>\bhf:/[^\s'\"]*)"
    rf"|(?<![\w/.]){_ROOT}(?=[^\s/])(?:[^\s'\":;,/]+/+(?=[^\s'\":;,/]))*"
)
_IS_PATH = re.compile(_ROOT)
# Their paths are of a machine, as those without a scheme are.
_OF_MACHINES = ("file", "ssh", "sftp", "scp", "rsync")
# A password may hold slashes, as keys of S3 do; after a port there is none.
_PASSWORD = re.compile(r"[^/@]*:(?!\d+(?:/|$))[^@]*@")


def _shortened(value: Any, key: str = "") -> Any:
    """JSON in which paths of this machine are only names, and URLs hold no user and no query.

    Args:
        value: the JSON.
        key: under which it is; what is under ``command`` is read as a shell does.
    """
    if isinstance(value, Mapping):
        return {name: _shortened(one, name) for name, one in value.items()}
    if isinstance(value, list):
        return [_shortened(one, key) for one in value]
    if not isinstance(value, str):
        return value
    if key == "command":
        with suppress(ValueError):  # no closing quotation
            return shlex.join(_shortened_word(word) for word in shlex.split(value))
    return _shortened_word(value)


def _shortened_word(text: str) -> str:
    """What is a path as a whole may hold spaces and commas; so may a value after ``=``."""
    key, equals, value = text.partition("=")
    if equals and re.fullmatch(r"[\w.-]+", key):
        return f"{key}={_shortened_word(value)}"
    if _IS_PATH.match(text) and "://" not in text:
        return text.rstrip("/").rpartition("/")[2] or text
    return _PLACE.sub(_shortened_place, text)


def _shortened_place(found: re.Match[str]) -> str:
    if found["hub"] is not None:
        return found["hub"]
    if found["scheme"] is None:
        return ""
    rest = re.split(r"[?#]", found["rest"], maxsplit=1)[0]
    if (password := _PASSWORD.match(found["rest"])) is not None:
        rest = re.split(r"[?#]", found["rest"][password.end() :], maxsplit=1)[0]
    if found["scheme"].lower() in _OF_MACHINES:
        return rest.rstrip("/").rpartition("/")[2]
    host, slash, path = rest.partition("/")
    return f"{found['scheme']}://{host.rpartition('@')[2]}{slash}{path}"


def _check_folder(folder: Path) -> None:
    """Refuse a folder with files that no call of ours has written.

    Raises:
        ConfigError: it holds such a file, or is one.
    """
    if not folder.is_dir():
        if folder.exists():
            raise ConfigError(f"{folder}: is a file: give a new or an empty folder")
        return
    found = {one.name for one in folder.iterdir()}
    if found - {*FILES}:
        named = min(found - {*FILES})
        raise ConfigError(f"{folder}: holds {named} too: give a new or an empty folder")
    if found:
        try:
            open_exported(folder / hub.WEIGHTS)
        except ConfigError:
            raise ConfigError(
                f"{folder}: holds {min(found)}, and no {hub.WEIGHTS} of dinogen, so `dinogen "
                "publish` did not write it: give a new or an empty folder"
            ) from None


def _refuse_own_code(config: Mapping[str, Any]) -> None:
    """Refuse a family or guide that nobody else has.

    Raises:
        ConfigError: the config names a file of one's own.
    """
    for key, file in hub.code_of(config):
        raise ConfigError(
            f"{key}: {file} is on this machine alone, and code from the hub is never run, so "
            "nobody could load the generator: hand on a file of `dinogen export`, and that code"
        )


def _refuse_own_autoencoder(info: Mapping[str, Any]) -> None:
    """Refuse a generator of latents that nobody else could decode.

    Raises:
        ConfigError: its autoencoder is on this machine alone.
    """
    known = info.get("autoencoder")
    if known is None:
        return
    path = str((info["config"]["family"].get("latent") or {}).get("path") or known["path"])
    here = path.startswith(("/", "~", ".")) or Path(path).exists()
    if not hub.is_address(path) and (here or path.endswith(EXPORTED_SUFFIX)):
        raise ConfigError(
            f"family.latent.path: {path} is on this machine alone, so nobody could decode the "
            "samples: publish the autoencoder first, one of ours by `dinogen publish`, a folder of "
            "diffusers by `hf upload`; then set family.latent.path=hf://USER/NAME in the run's "
            "config.yaml, and publish the run, or export it again"
        )


def _evaluation(source: Path, info: Mapping[str, Any]) -> dict[str, Any] | None:
    """What is known of evaluation.json, if it is of the checkpoint that is published."""
    run = results_folder(source) if is_exported(source) else source
    found = Run(run).stage(info["resolution"]).evaluation
    if found is None or found.get("nimg") != info["nimg"]:
        return None
    measured = found.get("measured") or {}
    known = {name: one for name, one in measured.items() if one["value"] is not None}
    shortened: dict[str, Any] = _shortened(found | {"measured": known, "not_measured": {}})
    return shortened


def _evaluation_of_card(card: Mapping[str, Any]) -> dict[str, Any]:
    """The metric values in an exported file's card, as evaluation.json has them.

    Files of earlier versions do not say whether a feature extractor was random, which is None then.
    """
    measured = {
        name: {"name": name, "better": "none", **one} for name, one in card["metrics"].items()
    }
    marks = {
        one["fingerprint"]: {"random": one.get("random"), "split": one.get("split")}
        for one in measured.values()
    }
    return {"measured": measured, "fingerprints": marks}
