"""Steps on fake CUDA tensors: everything counted, and the time of a GPU modelled."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from fake_cuda.mode import Counting, fake_cuda

from dinogen.config import Config
from dinogen.training.engines.base import resolve_precision
from train_steps.counts import Counts, Gpu
from train_steps.runner import LEFT, ROOT, Runner


def count(
    config: Config, stage: int, steps: Sequence[int], gpu: Gpu, named: bool = False
) -> Iterator[dict[str, Counts]]:
    """Count steps, after one that is not counted: it makes the state of optimizers.

    Args:
        config: with data.
        stage: its number; from the end if negative.
        steps: numbers of steps, which say what is due in them.
        gpu: the one that is modelled.
        named: count launches by their lines too.

    Yields:
        What each step costs, by its parts.
    """
    import torch

    precision = resolve_precision(config.engine.precision, torch.device("cuda"))
    counting = Counting(ROOT, gpu, precision, named)
    with fake_cuda(counting), Runner(config, stage, counting.enter) as runner:
        runner.step(max(steps))
        for number in steps:
            counting.begin(LEFT)
            runner.step(number)
            yield counting.parts
