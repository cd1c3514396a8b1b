"""Walks the stages of a run: each continues where it was, or is skipped if it is finished."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from dinogen import hub
from dinogen.config import Config, StagePlan, dump_config, find_stage, with_lengths
from dinogen.distributed import process_group
from dinogen.distributed.failure import failure_propagation
from dinogen.errors import UserError
from dinogen.families.registry import resolve
from dinogen.files import write_text
from dinogen.report.run_page import write_page
from dinogen.runs.lock import run_lock
from dinogen.runs.run import Run
from dinogen.training.checkpointing.checkpoint import NewestCheckpoints
from dinogen.training.data import open_data
from dinogen.training.logging.artifacts import finish_stage
from dinogen.training.logging.begin import say_what_begins
from dinogen.training.logging.logger import cut_lines
from dinogen.training.logging.sinks.senders import Senders
from dinogen.training.preflight import check_run
from dinogen.training.state import StageState, is_finished
from dinogen.training.stop import StopFlag
from dinogen.training.trainer import Trainer
from shards.read.dataset import Dataset

log = logging.getLogger(__name__)


def train(config: Config, *resolutions: int) -> list[dict[str, Any]]:
    """Train all stages of a config, or one; the same call again goes on where it was.

    Args:
        config: the whole run.
        resolutions: train only the stages of these resolutions, in this order.

    Returns:
        The stages' results, as in their result.json.

    Raises:
        ConfigError: the config does not fit the data, the checkpoints or this machine.
        Stopped: a signal arrived; everything is saved.
        TrainingError: too many updates in a row were not finite.
    """
    process_group.use_device(config.device)
    process_group.init()
    process_group.set_cpu_threads()
    config = resolve(config)
    indices = [find_stage(config, size) for size in resolutions] or list(range(len(config.stages)))
    with (
        StopFlag() as stop,  # until the sinks have all, so that no signal changes the exit code
        Senders(stop) as senders,  # before the others: no rank waits for what is still sent
        failure_propagation(),
        run_lock(config.run),
    ):
        config = _pinned(config)
        data = open_data(config)
        config = with_lengths(config, data.num_samples(config.data.split))
        checkpoints = NewestCheckpoints(config.run)
        families = check_run(config, indices, data, checkpoints)
        say_what_begins(config, families, data)
        if process_group.is_main():
            write_text(Run.of(config).config_file, dump_config(config))
            senders.start(config)
        results = []
        for number, index in enumerate(indices):
            later = sum(config.stages[i].num_images for i in indices[number + 1 :])
            results.append(_train_stage(config, index, stop, data, checkpoints, later))
            with process_group.rank_zero_section() as mine:
                if mine:
                    # Also for a skipped stage: a kill may have come before its page was written
                    _write_page(config.run)
            if index != indices[-1] and stop.agreed():
                raise stop.error(f"after stage {config.stages[index].resolution}")
        return results


def _pinned(config: Config) -> Config:
    """The config at one commit of each address of the hub on all ranks: rank 0 asks for it."""
    with process_group.rank_zero_section() as mine:
        found = hub.find_pins(config) if mine else {}
    return hub.with_pins(config, process_group.broadcast_object(found))


def _train_stage(
    config: Config,
    index: int,
    stop: StopFlag,
    data: Dataset,
    checkpoints: NewestCheckpoints,
    later: int,
) -> dict[str, Any]:
    """Train one stage to its end and write what it leaves."""
    stage = config.stages[index]
    finished = _finished_result(config, index, checkpoints)
    if finished is not None:
        log.info("stage %s is finished already", Run.of(config).stage(stage.resolution).name)
        return finished
    state = StageState(config, index, data, checkpoints)
    if not state.finished:
        Trainer(state, stop, later).run()
    result = None
    with process_group.rank_zero_section() as mine:
        if mine:
            cut_lines(state.place.stats_file, state.progress.nimg)
            # a log that was lost costs the stage its curve, and no more
            lines = state.place.stats
            result = finish_stage(state, lines[-1] if lines else {})
    written: dict[str, Any] = process_group.broadcast_object(result)
    return written


def _finished_result(
    config: Config, index: int, checkpoints: NewestCheckpoints
) -> dict[str, Any] | None:
    """result.json of a stage whose newest checkpoint is at the end that the config sets."""
    stage = config.stages[index]
    checkpoint = checkpoints.of(stage.resolution)
    if checkpoint is None:
        return None
    state = checkpoint.state
    place = Run.of(config).stage(stage.resolution)
    result = None
    if process_group.is_main() and is_finished(config, stage, state):
        nimg, end = state["progress"]["nimg"], StagePlan(stage, state["start"]).end
        if nimg >= end + stage.batch:
            log.warning(
                "stage %s: its checkpoint has seen %d images and the config ends it at %d (kimg "
                "or epochs were lowered): the stage counts as finished",
                place.name, nimg, end,
            )  # fmt: skip
        read = place.read_result()
        for problem in read.messages():
            log.warning("%s: it is written again", problem)
        sound = read.value is not None and not read.problems
        result = read.value if sound and _is_whole(read.value, state) else None
    found: dict[str, Any] | None = process_group.broadcast_object(result)
    return found


def _is_whole(result: dict[str, Any] | None, state: dict[str, Any]) -> bool:
    """Whether a result holds what its readers need, and is that of the checkpoint."""
    result = result or {}
    return (
        result.get("nimg") == state["progress"]["nimg"]
        and "resolution" in result
        and "final" in (result.get("files") or {})
    )


def _write_page(run: Path) -> None:
    """Write the page of a run; a damaged file of it costs the page, and no training."""
    try:
        log.info("page: %s", write_page(run))
    except UserError as error:
        log.warning("no page: %s", error)
