"""What a stage is fed with: the batches of its stream and, beside each, a bank of further reals."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

from dinogen.distributed import process_group, rng
from dinogen.families.base import Batch
from dinogen.training.state import StageState
from shards.read.stream import Stream


class Feed:
    """Endless batches of this rank from where the stage is; a context, to be closed.

    Args:
        state: the stage, fresh or resumed.

    Raises:
        ManifestError: the data lack what the family reads.
    """

    def __init__(self, state: StageState) -> None:
        inputs, stage, progress = state.family.inputs, state.stage, state.progress
        self._streams = [
            _stream(state, stage.batch, state.config.seed, progress.nimg, inputs.image_size)
        ]
        if inputs.bank:
            num_steps = (progress.nimg - state.plan.start) // stage.batch
            first, second = rng.derive(state.config.seed, f"bank/{stage.resolution}")
            seed, start = first << 32 | second, num_steps * inputs.bank
            self._streams.append(_stream(state, inputs.bank, seed, start, None))
        self._stack = ExitStack()

    @property
    def num_skipped(self) -> int:
        """Damaged samples that were replaced so far."""
        return sum(stream.num_skipped for stream in self._streams)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        batch: Batch = next(self._streams[0])
        for bank in self._streams[1:]:
            batch["bank"] = next(bank)
        return batch

    def __enter__(self) -> Feed:
        for stream in self._streams:
            self._stack.enter_context(stream)
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()


def _stream(state: StageState, batch: int, seed: int, start: int, image_size: int | None) -> Stream:
    config = state.config.data
    return state.data.stream(
        batch_size=batch,
        seed=seed,
        rank=process_group.rank(),
        world_size=process_group.world_size(),
        start=start,
        image_size=image_size,
        levels=state.family.inputs.levels,
        split=config.split,
        num_threads=config.num_threads,
        num_lanes=config.num_lanes,
        window_shards=config.window_shards,
        on_error=config.on_error,
        pin_memory=state.device.type == "cuda",
        need_labels=state.family.inputs.labels,
    )
