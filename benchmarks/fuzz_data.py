"""Shards for the cases of benchmarks/fuzz.py: of any sizes, with damaged samples among them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import discs
import numpy as np
from fuzz_cases import Case
from ranks import call

from shards.check.adopt import adopt
from shards.format.sample import Sample, encode
from shards.write.shard_writer import write_shard

NUM_SAMPLES = 70  # no case asks for more


class FuzzData:
    """Draws samples once.

    Args:
        folder: gets ``guide``.
    """

    def __init__(self, folder: Path) -> None:
        call(_draw, folder)
        with np.load(folder / "samples.npz") as file:
            self.samples = [
                Sample("any", file[f"{n}/png"].tobytes(), "png", {}, _levels(file, n))
                for n in range(NUM_SAMPLES)
            ]
        self.guide = json.loads((folder / "guide.json").read_text())

    def make(self, folder: Path, case: Case) -> None:
        """Shards of the sizes that the case asks for; then flip some bytes."""
        folder.mkdir(parents=True)
        left = iter(self.samples)
        for split, sizes in (("train", case.train), ("val", case.val)):
            number = 0
            for shard, size in enumerate(sizes):
                members = []
                for _ in range(size):
                    members.append((f"{split}{number:03d}", encode(next(left))))
                    number += 1
                write_shard(folder / f"{split}-{shard:05d}.tar", split, members)
        adopt(folder)[0].model_copy(update={"guide": self.guide}).save(folder)
        first = {"train": 0, "val": sum(case.train)}
        for split, number in case.corrupt:
            for array in self.samples[first[split] + number].levels.values():
                _flip(folder, array.tobytes())


def _draw(folder: Path) -> None:
    """Guide and samples; runs where everything is imported."""
    guide = discs.make_guide(folder / "guide")
    arrays: dict[str, Any] = {}
    for number, sample in enumerate(discs.draw(guide, NUM_SAMPLES)):
        arrays[f"{number}/png"] = np.frombuffer(sample.image, np.uint8)
        arrays |= {f"{number}/{name}": values for name, values in sample.levels.items()}
    np.savez(folder / "samples.npz", **arrays)
    (folder / "guide.json").write_text(json.dumps(guide.info.to_dict()))


def _levels(file: Any, number: int) -> dict[str, Any]:
    return {f"n{grid}": file[f"{number}/n{grid}"] for grid in discs.GRIDS}


def _flip(folder: Path, payload: bytes) -> None:
    """Change one byte of a payload, in whichever shard it lies."""
    for path in folder.glob("*.tar"):
        data = bytearray(path.read_bytes())
        at = data.find(payload)
        if at >= 0:
            data[at + len(payload) // 2] ^= 0x40
            path.write_bytes(data)
            return
    raise AssertionError("no such payload")
