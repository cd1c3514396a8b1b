"""A training killed at random moments, by benchmarks/chaos.py; and that it would see a fault."""

from __future__ import annotations

import json

import pytest
import torch
from torch.utils.tensorboard import SummaryWriter

from dinogen.training.checkpointing.checkpoint import on_host, save_checkpoint
from tests.training.benchmarks import FOLDER, benchmark  # noqa: F401

BATCH = 4


@pytest.fixture
def checks(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import chaos_checks

    return chaos_checks


@pytest.mark.parametrize("options", [("4", "--engine", "any"), ("2", "--fixed-world", "3")])
def test_a_run_killed_at_random_moments_ends_as_one_that_was_left_alone(
    benchmark,  # noqa: F811
    options,
):
    """Few kills; tests/stress has more of them, and of the ways to start ranks."""
    printed = benchmark("chaos", "--seed", "5", "--steps", "48", "--kills", *options)
    table = dict(line.split("  ", 1) for line in printed.splitlines() if "  " in line)
    assert table["kills"].strip().startswith(f"{options[0]} (")
    assert table["violations"].strip() == "0"
    assert int(table["steps redone"]) > 0


def records(checks, first: int, num_steps: int, until: int | None = None):
    """Steps of one start; the last one reached only some ranks if ``until`` says so."""
    found = checks.Records({0: 1})
    for nimg in range(first, first + num_steps * BATCH, BATCH):
        found.steps[nimg] = {p: f"key{p % 8}" for p in range(nimg, nimg + BATCH)}
    if until is not None:
        found.steps[max(found.steps)] = {
            p: key for p, key in found.steps[max(found.steps)].items() if p < until
        }
    return found


def test_the_keys_of_a_right_run_pass(checks):
    whole = records(checks, 0, 6)
    attempts = [records(checks, 0, 3, 10), records(checks, 4, 2, 8), records(checks, 8, 4)]
    assert checks.check_keys(attempts, whole, 8) == []


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("lost", "made in one run only, at [12]"),
        ("half", "sequence of consumed keys differs"),
        ("other", "other samples in the step at 8"),
        ("other half", "other samples in the step at 8"),
        ("half in the midst", "other samples in the step at 4"),
        ("twice", "consumed by two ranks"),
        ("epoch", "repeats a sample"),
    ],
)
def test_a_wrong_order_is_seen(checks, fault, message):
    whole = records(checks, 0, 6)
    attempts = [records(checks, 0, 3, 10), records(checks, 8, 4)]
    if fault == "lost":
        attempts[1] = records(checks, 16, 2)
        attempts[0].steps[8] = dict(whole.steps[8])
    elif fault == "half":
        attempts[1] = records(checks, 8, 4, 22)
    elif fault == "other":
        attempts[1].steps[8][9] = "key7"
    elif fault == "other half":
        attempts[0].steps[8][9] = "key7"
    elif fault == "half in the midst":
        del attempts[0].steps[4][5]
    elif fault == "twice":
        attempts[0].twice.append(3)
    else:
        whole.steps[4][5] = attempts[0].steps[4][5] = "key0"
    assert any(message in text for text in checks.check_keys(attempts, whole, 8))


def write_run(folder, points=(8, 16, 24), value=1.0, again=None, purge=True, stats=None):
    """What a run leaves, in both stages: curves, with a point written again after a resume."""
    for size in (4, 8):
        stage = folder / f"{size}x{size}"
        writer = SummaryWriter(str(stage / "tb"))
        for nimg in points:
            writer.add_scalar("loss", value / nimg, nimg)
        writer.close()
        # As if long ago: within a second the numbers of writers, 9 and 10, sort as words.
        for file in (stage / "tb").iterdir():
            file.rename(file.with_name(file.name.replace("tfevents.1", "tfevents.0", 1)))
        if again is not None:
            writer = SummaryWriter(str(stage / "tb"), purge_step=again if purge else None)
            writer.add_scalar("loss", value / again, again)
            writer.close()
        lines = [{"nimg": n, "loss": value / n, "images_per_s": n} for n in stats or points]
        (stage / "stats.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        tensors = {name: {"w": torch.full((2,), value)} for name in ("G", "G.ema", "optim")}
        save_checkpoint(stage / "checkpoints", 24, on_host(tensors), {})
    return folder


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"again": 24}, None),
        ({"points": (8, 24)}, "has holes at [16]"),
        ({"stats": (8, 16, 16, 24)}, "stats.jsonl: loss overlaps at [16]"),
        ({"again": 24, "points": (8, 16), "stats": (8, 16, 24)}, None),
        ({"again": 16, "stats": (8, 16, 24)}, "TensorBoard: loss overlaps at [], has holes at"),
        ({"again": 16, "purge": False}, "TensorBoard: loss overlaps at [16]"),
        ({"value": 1.01}, "instead of"),
    ],
)
def test_an_overlap_a_hole_and_another_value_are_seen(checks, tmp_path, fault, message):
    run, whole = write_run(tmp_path / "run", **fault), write_run(tmp_path / "whole")
    found = checks.check_curve(run, whole, 1e-3)
    if message is None:
        assert found == []
    else:
        assert any(message in text for text in found), found


def test_any_difference_of_weights_is_seen(checks, tmp_path):
    run, whole = write_run(tmp_path / "run"), write_run(tmp_path / "whole")
    assert checks.distances(run, whole) == {"G": 0, "G.ema": 0, "optim": 0}
    other = write_run(tmp_path / "other", value=1 + 1e-6)
    assert all(0 < apart < 2e-6 for apart in checks.distances(other, whole).values())


def test_the_newest_checkpoint_is_a_whole_one(checks, tmp_path):
    folder = write_run(tmp_path / "run")
    assert checks.newest(folder) == 24
    half = folder / "8x8" / "checkpoints" / ".tmp-000000032"
    half.mkdir()
    assert checks.newest(folder) == 24
    assert [name for name, _ in checks.unfinished(folder)] == [half.name]
    half.rename(half.with_name("000000032"))
    with pytest.raises(ValueError, match="missing"):
        checks.newest(folder)
