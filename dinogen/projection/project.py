"""Projects photos into a run: finds the latents of which its generator makes them."""

from __future__ import annotations

import logging
import math
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dinogen.errors import UserError
from dinogen.evaluation.record import check_changes
from dinogen.families.abilities import (
    AddsNoise,
    AdjustsSampling,
    HasLatentSpaces,
    Inverts,
    LatentSpace,
    adjustable,
    num_classes_of,
    spaces_of,
)
from dinogen.files import why_not_writable, write_json
from dinogen.hub import cached_name, shown, working_path
from dinogen.prepare.pipeline import NoFaceError, in_words
from dinogen.projection.latents import FILE, identity_of, write_projected
from dinogen.projection.loss import Loss, choose_loss
from dinogen.projection.photos import Cutting, Rejected, Target, cutting_of, read_targets
from dinogen.projection.search import Found, Searcher
from dinogen.projection.show import Shown, write_page, write_shown
from dinogen.report.video import MISSING, can_write_mp4
from dinogen.runs.files import read_object
from dinogen.training.checkpointing.snapshot import Snapshot, load_snapshot

log = logging.getLogger(__name__)

RESULTS = "results.json"
STEPS = 500
RESTARTS = 4
NUM_MEAN, NUM_MEAN_SLOW = 256, 16
# images that are searched together: restarts count, and those of 64x64 fit into a cache
PIXELS_AT_ONCE = 40 * 64 * 64
_CHANGE = re.compile(r"[a-z_]+(\.\w+)+=")


@dataclass(frozen=True)
class ProjectionRequest:
    """What is projected, and how.

    Attributes:
        run: folder of a run, an exported file, or an address of the hub.
        photos: files, and folders of some.
        space: of the latents; the best that the family has unless given.
        steps: of the search, :data:`STEPS` unless given; for a family that inverts images those of
            the search that follows, none unless given; for diffusion those of DDIM.
        restarts: searches in z for each photo.
        loss: see :func:`dinogen.projection.loss.choose_loss`.
        seed: of all random numbers.
        resolution: the stage; the largest trained unless given.
        nimg: the checkpoint; the newest unless given.
        label: the class, of families that have classes.
        align: False for photos that are crops already.
        out: folder; ``RUN/projections`` unless given.
        overwrite: whether finished photos are projected again.
        places: ``KEY=VALUE`` changes of where data, guides and weights lie.
    """

    run: Path
    photos: tuple[Path, ...]
    space: str | None = None
    steps: int | None = None
    restarts: int = RESTARTS
    loss: str = "auto"
    seed: int = 0
    resolution: int | None = None
    nimg: int | None = None
    label: int | None = None
    align: bool = True
    out: Path | None = None
    overwrite: bool = False
    places: tuple[str, ...] = ()


@dataclass
class Projections:
    """What came of it.

    Attributes:
        folder: with a folder per photo, and a page.
        page: of all photos in the folder.
        done: results of the photos that were projected now, as in results.json.
        skipped: names of those that were finished before.
        rejected: photos that cannot be projected, and why.
    """

    folder: Path
    page: Path
    done: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)


Progress = Callable[[int, int], None]


def project(
    request: ProjectionRequest,
    progress: Progress = lambda done, total: None,
    tell: Callable[[str], None] = lambda line: None,
) -> Projections:
    """Project photos, and write for each ``projected.safetensors``, an image, a video, results.

    Args:
        request: what is projected.
        progress: called with the number of steps done, over all photos, and of all steps.
        tell: called with a line of what the user should know.

    Raises:
        ConfigError: no such run, stage or checkpoint.
        UserError: the family does not have what an option asks for; names the option. Or a photo
            is a change of the config.
        NoFaceError: no photo can be used.
    """
    check_changes(request.places)
    for photo in request.photos:
        if _CHANGE.match(str(photo)) and not photo.exists():
            raise UserError(
                f"{photo}: is no photo: changes of the config are given by --set {photo}"
            )
    request = replace(request, run=working_path(request.run))
    snapshot = load_snapshot(request.run, request.resolution, request.nimg, request.places)
    method = _Method.of(request, snapshot)
    family = snapshot.family
    folder = request.out or snapshot.place.run.projections_folder
    if problem := why_not_writable(folder / RESULTS, make=True):
        raise UserError(f"{folder}: cannot be written: {problem}: give --out FOLDER")
    cutting = cutting_of(family.config, request.align)
    targets, rejected, notes = read_targets(
        request.photos, cutting, snapshot.resolution, family.device
    )
    for line in (*notes, *(f"{one.photo}: left out: {one.reason}" for one in rejected)):
        tell(line)
    if not targets:
        counts: dict[str, int] = {}
        for one in rejected:
            reason = one.reason.partition(":")[0]
            counts[reason] = counts.get(reason, 0) + 1
        hint = "; --no-align takes images that are crops already" if counts.keys() & _FACES else ""
        raise NoFaceError(f"none of the photos can be projected ({in_words(counts)}){hint}", counts)
    facts = snapshot.checkpoint.state["facts"]
    loss = choose_loss(request.loss, family.config, facts, snapshot.resolution, family.device)
    if num_classes_of(family) and request.label is None:
        tell("class 0 is taken for all photos: --class chooses another")
    tell(f"loss: {loss.what}")
    for reason in loss.missing:
        tell(f"  a better loss is not available: {reason}")
    if not can_write_mp4():
        log.warning("the way of each photo is a GIF and no mp4: %s", MISSING)
    work = _Work(request, snapshot, method, loss, cutting, folder)
    found = Projections(folder, folder / "projections.html", rejected=rejected)
    waiting: list[Target] = []
    for target in targets:
        state = work.finished(target)
        if state is None:
            waiting.append(target)
        elif state:
            found.rejected.append(Rejected(target.photo, state))
            tell(f"{target.photo}: left out: {state}")
        else:
            found.skipped.append(target.name)
    total = len(waiting) * max(1, method.steps)
    for first in range(0, len(waiting), method.at_once):
        part = waiting[first : first + method.at_once]

        def moved(step: int, part: list[Target] = part, first: int = first) -> None:
            progress(first * max(1, method.steps) + len(part) * step, total)

        for result in work.project(part, moved):
            found.done.append(result)
            write_page(found.page, folder, RESULTS)
        progress(min(total, (first + len(part)) * max(1, method.steps)), total)
    write_page(found.page, folder, RESULTS)
    return found


@dataclass(frozen=True)
class _Method:
    """How this family's latents are found.

    Attributes:
        space: in which.
        inverts: whether the family computes them, before any search.
        steps: of the search; 0 for none.
        restarts: searches for each photo.
        at_once: photos that are projected together.
        label: class of the images.
    """

    space: LatentSpace
    inverts: bool
    steps: int
    restarts: int
    at_once: int
    label: int

    @classmethod
    def of(cls, request: ProjectionRequest, snapshot: Snapshot) -> _Method:
        """What the request means for the family.

        Raises:
            UserError: it does not have what an option asks for.
        """
        family = snapshot.family
        name = f"family {family.config.family.name}"
        spaces = spaces_of(family)
        chosen = request.space or (
            family.spaces[-1].name if isinstance(family, HasLatentSpaces) else "z"
        )
        if chosen not in spaces:
            raise UserError(f"--space {chosen}: {name} has {', '.join(spaces)}: choose one of them")
        inverts = isinstance(family, Inverts) and chosen == "z"
        refines = not inverts or (isinstance(family, Inverts) and family.refines)
        steps = request.steps
        if steps is None or not refines:
            steps = 0 if inverts else STEPS
        if not inverts and steps < 1:
            raise UserError(f"--steps 0: {name} has no encoder, so its latents are searched")
        num_classes = num_classes_of(family)
        if request.label is not None and request.label >= num_classes:
            what = f"classes are 0 to {num_classes - 1}" if num_classes else "it has no classes"
            raise UserError(f"--class {request.label}: {name}: {what}")
        space = spaces[chosen]
        restarts = request.restarts if space.normal and not inverts else 1
        at_once = max(1, PIXELS_AT_ONCE // (snapshot.resolution**2 * restarts))
        return cls(space, inverts, steps, restarts, at_once, request.label or 0)


class _Work:
    """Projects parts of the photos with what they have in common."""

    def __init__(
        self,
        request: ProjectionRequest,
        snapshot: Snapshot,
        method: _Method,
        loss: Loss,
        cutting: Cutting,
        folder: Path,
    ) -> None:
        self.request = request
        self.method = method
        self.loss = loss
        self.cutting = cutting
        self.folder = folder
        self.networks = snapshot.ema.networks
        self.resolution = snapshot.resolution
        family = snapshot.family
        sampling: dict[str, Any] = {}
        if isinstance(family, AdjustsSampling) and "steps" in adjustable(family):
            noiseless = family.without_noise if isinstance(family, AddsNoise) else {}
            sampling = {**noiseless, **({"steps": request.steps} if request.steps else {})}
            family = family.with_sampling(sampling)
        self.family = family
        self.run = cached_name(request.run) or request.run.resolve().name
        self.mark = snapshot.mark
        self._mean: Tensor | None = None
        self.searcher = Searcher(
            family,
            self.networks,
            method.space,
            loss,
            request.seed,
            method.label,
            method.steps,
            method.restarts,
        )
        how = family.inverts_by if isinstance(family, Inverts) and method.inverts else "a search"
        if method.inverts and method.steps:
            how += f", then a search of {method.steps} steps"
        self.settings: dict[str, Any] = {
            "checkpoint": identity_of(snapshot),
            "space": method.space.name,
            "how": how,
            "steps": method.steps,
            "restarts": method.restarts,
            "seed": request.seed,
            "label": method.label if num_classes_of(family) else None,
            "sampling": sampling,
            "loss": loss.name,
            "cut": cutting.config.model_dump(mode="json", exclude={"batch", "num_threads"}),
        }

    def finished(self, target: Target) -> str | None:
        """Empty if a photo is finished; what stands in its way; None if it is to be projected."""
        folder = self.folder / target.name
        if self.request.overwrite or not (folder / RESULTS).exists():
            return None
        before = read_object(folder / RESULTS).value or {}
        if before.get("sha256") != target.sha256:
            return f"{folder} holds the projection of another photo: give --overwrite or --out"
        old = before.get("settings") or {}
        changed = [name for name, value in self.settings.items() if old.get(name) != value]
        if changed:
            return (
                f"{folder} holds a projection of other settings ({', '.join(changed)}): give "
                "--overwrite or --out"
            )
        return ""

    def project(
        self, targets: Sequence[Target], progress: Callable[[int], None]
    ) -> Iterator[dict[str, Any]]:
        """Project photos together and write their folders; yields their results."""
        device, method = self.family.device, self.method
        images = torch.stack([target.image for target in targets]).to(device)
        positions = torch.tensor([int(target.sha256[:15], 16) for target in targets])
        start: Tensor | None = None
        if method.inverts:
            assert isinstance(self.family, Inverts)
            numbers = torch.full((len(images),), method.label)
            with torch.no_grad():
                start = self.family.invert(self.networks, images, numbers)
        if method.steps:
            found = self.searcher.search(images, positions, start, progress)
        else:
            assert start is not None
            found = Found(start, None, torch.zeros(0, len(images)))
        with torch.no_grad():
            made = self.searcher.decode(found.latents, found.noise)
            begun = None if start is None else self.searcher.decode(start, None)
            if begun is None and not method.space.normal:
                mean, _ = self.searcher.statistics
                begun = self.searcher.decode(mean.expand(1, *method.space.shape), None)
        if not bool(made.isfinite().all()):
            raise UserError(
                f"{shown(self.request.run)}: its images are not finite, so nothing can be "
                "projected: give an earlier checkpoint by --nimg"
            )
        before = self._errors(self._mean_image(), images)
        first = None if begun is None else self._errors(begun, images)
        after = self._errors(made, images)
        for n, target in enumerate(targets):
            noise = None if found.noise is None else found.noise[n : n + 1]
            errors = [round(value, 6) for value in found.errors[:, n].tolist()]
            info: dict[str, Any] = {
                "name": target.name,
                "photo": str(target.photo),
                "sha256": target.sha256,
                "run": self.run,
                "generated": True,
                "settings": self.settings,
                "cut_by": self.cutting.source,
                "loss": {
                    "what": self.loss.what,
                    "better_not_available": list(self.loss.missing),
                },
                "before": {"mean_image": before[n]},
                "after": after[n],
                "error_left": _share(after[n], before[n]),
            }
            if first is not None:
                info["before"]["encoded" if method.inverts else "mean_latent"] = first[n]
            frames = [frame[n] for frame in found.frames]
            drawn = Shown(
                self.folder / target.name,
                target.image,
                made[n].cpu(),
                target.whole_photo(self.cutting.config.max_pixels),
                frames,
                self.mark,
            )
            place = self.folder / target.name
            (place / RESULTS).unlink(missing_ok=True)  # what follows belongs to new ones
            info["files"] = write_shown(drawn, info["after"]["rms"])
            about = {name: info[name] for name in _OF_THE_FILE} | {"errors": errors}
            about["photo"] = target.photo.name  # a file that is handed on tells no folders
            write_projected(place / FILE, found.latents[n : n + 1], noise, about)
            info["files"]["latents"] = FILE
            info["command"] = self._command(target)
            # the last file: with it a photo is finished
            write_json(place / RESULTS, info | {"errors": errors})
            yield info

    @torch.no_grad()
    def _mean_image(self) -> Tensor:
        """The mean of samples (1, 3, R, R), the best that one image for all photos could be."""
        if self._mean is None:
            # a walk of diffusion takes as long as hundreds of other images
            slow = isinstance(self.family, Inverts) and not self.family.refines
            num = NUM_MEAN_SLOW if slow else NUM_MEAN
            parts = [
                self.family.sample(self.networks, part, self.request.seed).float().sum(0)
                for part in torch.arange(num).split(32)
            ]
            self._mean = torch.stack(parts).sum(0)[None] / num
        return self._mean

    def _errors(self, made: Tensor, images: Tensor) -> list[dict[str, float]]:
        """Of each image: root mean square of 0 to 255, distance of features, and the loss."""
        with torch.no_grad():
            # as they are written
            seen, wanted = self.loss.seen(made.clamp(-1, 1)), self.loss.seen(images)
            pixels, features = self.loss.terms(seen, wanted)
            total = self.loss.between(seen, wanted)
        return [
            {
                "rms": round(127.5 * math.sqrt(p), 3),
                "mse": round(p, 6),
                "features": round(f, 6),
                "loss": round(t, 6),
            }
            for p, f, t in zip(pixels.tolist(), features.tolist(), total.tolist(), strict=True)
        ]

    def _command(self, target: Target) -> str:
        """The command that projects the photo again."""
        own, request = self.settings, self.request
        words = ["dinogen", "project", shown(request.run), str(target.photo)]
        words += ["--space", own["space"], "--seed", str(request.seed), "--loss", own["loss"]]
        words += ["--stage", str(self.resolution), "--nimg", str(own["checkpoint"]["nimg"])]
        if request.steps is not None:
            words += ["--steps", str(request.steps)]
        words += ["--restarts", str(request.restarts)]
        words += [] if own["label"] is None else ["--class", str(own["label"])]
        words += [] if request.align else ["--no-align"]
        words += [] if request.out is None else ["--out", str(request.out)]
        words += [word for place in request.places for word in ("--set", place)]
        return shlex.join(words)


_FACES = {"no_face", "small_face", "low_probability", "bad_landmarks"}
_OF_THE_FILE = (
    *("name", "photo", "sha256", "run", "generated"),
    *("settings", "loss", "before", "after"),
)


def _share(after: dict[str, float], before: dict[str, float]) -> dict[str, float]:
    """What is left of each error; an error that was 0 has no share."""
    return {name: round(after[name] / value, 4) for name, value in before.items() if value > 0}
