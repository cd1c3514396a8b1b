"""The cases of benchmarks/fuzz.py: drawn from a seed, each with what has to come of it."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

ENGINES = [("ddp", 1), ("deepspeed", 0), ("deepspeed", 1), ("deepspeed", 2)]
LOST = r"connection to another rank is lost|because rank \d failed"

# Where one rank can fail: in which kind of work, whether only rank 0 does it, and whether it comes
# at every step, so that one can be drawn.
PLACES = {
    "check_run": ("train", False, False),
    "build": ("train", False, False),
    "begin": ("train", False, False),
    "data": ("train", False, True),
    "loss": ("train", False, True),
    "step": ("train", False, True),
    "ema": ("train", False, True),
    "capture": ("train", False, False),
    "write": ("train", True, False),
    "probe": ("train", True, False),
    "samples": ("train", True, False),
    "finish": ("train", True, False),
    "page": ("train", True, False),
    "held_out": ("evaluate", False, False),
    "result": ("evaluate", True, False),
}
ERRORS = ("RuntimeError", "ConfigError", "MemoryError", "OSError", "KeyError", "AssertionError")


@dataclass(frozen=True)
class Fault:
    """What one rank meets.

    Attributes:
        place: one of :data:`PLACES`.
        how: an error's name, ``kill``, ``exit``, ``interrupt``, ``slow`` or ``stop``.
        rank: which one.
        step: how often the place is passed before.
    """

    place: str
    how: str
    rank: int
    step: int


@dataclass(frozen=True)
class Case:
    """One case.

    Attributes:
        number: names it, together with the seed.
        kind: of :data:`KINDS`.
        work: ``train`` or ``evaluate``.
        size: number of ranks.
        engine: engine.name and engine.zero.
        node_each: whether every rank believes to be on a node of its own.
        train: samples of each shard of the split ``train``.
        val: the same of ``val``.
        corrupt: samples with flipped bytes, as (split, number within it).
        config: changes to the config.
        options: of ``dinogen evaluate``.
        fault: what one rank meets.
        error: pattern of the right error; None if the right result has to come.
    """

    number: int
    kind: str
    work: str
    size: int
    engine: tuple[str, int]
    node_each: bool
    train: tuple[int, ...]
    val: tuple[int, ...] = ()
    corrupt: tuple[tuple[str, int], ...] = ()
    config: dict[str, Any] = field(default_factory=dict)
    options: tuple[str, ...] = ()
    fault: Fault | None = None
    error: str | None = None

    @property
    def title(self) -> str:
        """One line that says all."""
        parts = [f"{self.size} x {self.engine[0]} {self.engine[1]}", f"train {self.train}"]
        parts += [f"val {self.val}"] * bool(self.val) + list(self.options)
        parts += [f"damaged {self.corrupt}"] * bool(self.corrupt)
        if self.fault:
            f = self.fault
            parts.append(f"rank {f.rank}: {f.how} in {f.place} after {f.step}")
        parts += [f"{key}={value}" for key, value in self.config.items()]
        return f"{self.kind}: " + ", ".join(parts)


def draw(seed: int, number: int) -> Case:
    """Case ``number`` of a seed; all kinds come in turn."""
    rng = random.Random(f"{seed}/{number}")
    kind = list(KINDS)[number % len(KINDS)]
    size = rng.choice((2, 3))
    common: dict[str, Any] = {
        "number": number,
        "kind": kind,
        "work": "train",
        "size": size,
        "engine": rng.choice(ENGINES),
        "node_each": rng.random() < 0.4,
        "train": _shards(rng, 1, 5, 9),
        "config": _config(rng, size),
    }
    return Case(**common | KINDS[kind](rng, common))


def _uneven(rng: random.Random, common: dict[str, Any]) -> dict[str, Any]:
    """Shards of 1, 7, 2 ... samples."""
    return {"train": _shards(rng, 2, 5, 9)}


def _few(rng: random.Random, common: dict[str, Any]) -> dict[str, Any]:
    """Fewer samples than a batch, lanes or ranks; down to one, which is an error."""
    shards = rng.choice(((1,), (2,), (1, 1), (1, 1, 1), (2, 1), (3,)))
    return {
        "train": shards,
        "error": "two are the least that differ" if sum(shards) < 2 else None,
    }


def _empty(rng: random.Random, common: dict[str, Any]) -> dict[str, Any]:
    """No sample in the split that is asked for."""
    if rng.random() < 0.5:
        split = rng.choice(("val", "test"))
        return {
            "config": common["config"] | {"data.split": split},
            "error": rf"0 samples in split {split}|no split '{split}'",
        }
    return {"work": "evaluate", "options": ("--split", "val"), "error": "no samples in split val"}


def _batches(rng: random.Random, common: dict[str, Any]) -> dict[str, Any]:
    """Batches that ranks and microbatches do not divide; as small as the ranks, or smaller."""
    size = common["size"]
    batch = rng.choice((size - 1, size, size, size + 1, 5, 7, 11))
    return {
        "config": common["config"] | {"batch": batch, "engine.micro_batch": rng.choice((1, 2, 3))},
        "error": "smaller than the number of ranks" if batch < size else None,
    }


def _corrupt(rng: random.Random, common: dict[str, Any]) -> dict[str, Any]:
    """Flipped bytes: skipped, or the run stops with the name of one damaged sample."""
    shards = _shards(rng, 2, 4, 9)
    skip = rng.random() < 0.6
    num = rng.choice((1, 1, 2, sum(shards) - 2)) if skip else rng.choice((1, 1, 2))
    if rng.random() < 0.1:
        num = sum(shards)
    damaged = sorted(rng.sample(range(sum(shards)), num))
    config = common["config"] | {"data.on_error": "skip" if skip else "stop"}
    # as much is read as it takes for each sample to come by
    config |= {"batch": max(common["size"], 5), "steps": sum(shards) // 5 + 2}
    return {
        "train": shards,
        "corrupt": tuple(("train", n) for n in damaged),
        "config": config,
        "error": None if skip and num < sum(shards) else _names(damaged),
    }


def _raises(rng: random.Random, common: dict[str, Any]) -> dict[str, Any]:
    """One rank fails with an error of any kind, anywhere."""
    return _fault(rng, common, rng.choice(ERRORS)) | {"error": f"fuzz {common['number']} failed"}


def _killed(rng: random.Random, common: dict[str, Any]) -> dict[str, Any]:
    """One rank is killed anywhere."""
    return _fault(rng, common, "kill") | {"error": LOST}


def _leaves(rng: random.Random, common: dict[str, Any]) -> dict[str, Any]:
    """One rank leaves in a way that no ``except Exception`` sees, or rank 0 takes its time."""
    how = rng.choice(("exit", "interrupt", "slow", "slow"))
    return _fault(rng, common, how) | {"error": None if how == "slow" else LOST}


def _stopped(rng: random.Random, common: dict[str, Any]) -> dict[str, Any]:
    """One rank is asked to stop; the same command then goes on to the same result."""
    place = rng.choice(("data", "loss", "step", "ema"))
    step = rng.randrange(common["config"]["steps"])
    fault = Fault(place, "stop", rng.randrange(common["size"]), step)
    return {"fault": fault}


def _evaluated(rng: random.Random, common: dict[str, Any]) -> dict[str, Any]:
    """Held-out samples that the ranks do not divide, fewer than ranks, some of them damaged."""
    val = _shards(rng, 1, 3, 7)
    found: dict[str, Any] = {"work": "evaluate", "val": val}
    if rng.random() < 0.5:
        found["options"] = ("--num-samples", str(rng.randint(1, sum(val))))
    if rng.random() < 0.3:
        damaged = sorted(rng.sample(range(sum(val)), rng.randint(1, sum(val))))
        skip = rng.random() < 0.7
        found |= {"options": (), "corrupt": tuple(("val", n) for n in damaged)}
        found["config"] = common["config"] | {"data.on_error": "skip" if skip else "stop"}
        if not skip or len(damaged) == sum(val):
            found["error"] = _names(damaged)
    return found


KINDS = {
    "uneven": _uneven,
    "raises": _raises,
    "corrupt": _corrupt,
    "killed": _killed,
    "evaluated": _evaluated,
    "batches": _batches,
    "few": _few,
    "stopped": _stopped,
    "raises again": _raises,
    "killed again": _killed,
    "empty": _empty,
    "leaves": _leaves,
}


def _shards(rng: random.Random, low: int, high: int, most: int) -> tuple[int, ...]:
    """Sizes of shards, at least two samples in all."""
    sizes = tuple(rng.randint(1, most) for _ in range(rng.randint(low, high)))
    return sizes if sum(sizes) > 1 else (2,)


def _config(rng: random.Random, size: int) -> dict[str, Any]:
    """Of any run; ``batch``, ``steps`` and ``last`` make the stages."""
    return {
        "batch": rng.randint(size, 11),
        "steps": rng.randint(3, 6),
        "last": rng.random() < 0.5,  # whether the last batch goes over the end
        "two_stages": rng.random() < 0.3,
        "data.num_threads": rng.choice((0, 0, 1, 2)),
        "data.num_lanes": rng.choice((1, 3, 64)),
        "engine.micro_batch": rng.choice((None, 1, 2, 3)),
        "engine.clip_grad_norm": rng.choice((None, 0.5)),
    }


def _fault(rng: random.Random, common: dict[str, Any], how: str) -> dict[str, Any]:
    places = [p for p, (work, main, _) in PLACES.items() if how != "slow" or main]
    place = rng.choice(places)
    work, main_only, each_step = PLACES[place]
    rank = 0 if main_only else rng.randrange(common["size"])
    step = rng.randrange(common["config"]["steps"]) if each_step else 0
    found: dict[str, Any] = {"work": work, "fault": Fault(place, how, rank, step)}
    if work == "evaluate":
        found["val"] = (common["size"] + 1, 2)
    return found


def _names(damaged: list[int]) -> str:
    keys = "|".join(str(number) for number in damaged)
    return rf"(train|val)-\d+\.tar: (train|val)0*({keys})\b.*checksum|requested samples"
