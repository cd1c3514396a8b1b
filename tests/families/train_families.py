"""Run under torchrun: trains tiny families one after the other, each in the engine that is asked.

torchrun --nproc-per-node 2 tests/families/train_families.py DATA OUT FAMILY:ENGINE[:KEY=VALUE]...
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from dinogen.distributed import process_group
from dinogen.training.run import train
from tests.families.tiny import tiny_config


def run_of(out: Path, item: str) -> Path:
    """The folder of the run of one argument."""
    return out / "-".join(item.split(":")[:2])


if __name__ == "__main__":
    torch.set_num_threads(1)
    data, out = map(Path, sys.argv[1:3])
    for item in sys.argv[3:]:
        family, engine, *overrides = item.split(":")
        train(tiny_config(family, data, run_of(out, item), f"engine.name={engine}", *overrides))
    process_group.shutdown()
