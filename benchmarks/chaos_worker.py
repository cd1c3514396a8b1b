"""One rank of benchmarks/chaos.py: trains as `dinogen train` does and records what it consumes.

python benchmarks/chaos_worker.py CONFIG RECORDS
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from dinogen.distributed import process_group
from dinogen.training.trainer import Trainer


def train(config: Path, records: Path) -> None:
    """Train; ``RECORDS/<rank>.jsonl`` gets a line when the ranks are joined and one per step.

    A line is with the system as soon as it is written, so no kill loses it.
    """
    from launch.cli.main import main

    records.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(
        records / f"{process_group.rank()}.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644
    )

    def record(**values: Any) -> None:
        os.write(descriptor, (json.dumps(values) + "\n").encode())

    init, train_step = process_group.init, Trainer.train_step

    def joined(alone: bool = False) -> None:
        init(alone)
        record(pid=os.getpid())

    def recorded(self: Trainer, batch: dict[str, Any]) -> None:
        positions = batch["position"].tolist()
        record(nimg=self.progress.nimg, positions=positions, keys=list(batch["key"]))
        train_step(self, batch)

    process_group.init, Trainer.train_step = joined, recorded  # type: ignore[method-assign]
    sys.argv = ["dinogen", "train", str(config)]
    main()


if __name__ == "__main__":
    train(Path(sys.argv[1]), Path(sys.argv[2]))
