"""A study of real runs: killed and asked to stop, it goes on where it was."""

from __future__ import annotations

import json
import time

import pytest

from tests.launch.studies import kill_all, start_study, tiny_study


@pytest.fixture
def started():
    """Processes of a test; none of them stays, nor one that they have started."""
    processes = []
    yield processes
    for process in processes:
        if process.is_alive():
            kill_all(process.pid)


@pytest.mark.timeout(900)
def test_killed_twice_it_finishes_and_nothing_is_done_again(tmp_path, started):
    path = tiny_study(tmp_path)
    folder = tmp_path / "study"

    said = tmp_path / "said"

    def begin():
        process = start_study(path, said)
        started.append(process)
        return process

    def until_saved(process, run):
        """Until a run has a checkpoint, and is not done."""
        deadline = time.monotonic() + 300
        while not any((folder / run / "16x16" / "checkpoints").glob("0*")):
            assert process.is_alive(), said.read_text()[-3000:]
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def kept(run):
        """Identity of what a finished run has left."""
        stage = folder / run / "16x16"
        files = [stage / name for name in ("result.json", "evaluation.json", "looks/looks.json")]
        return [(file.stat().st_ino, file.stat().st_mtime_ns) for file in files]

    process = begin()
    until_saved(process, "gan/wgan_gp-seed0")
    kill_all(process.pid)
    process.join()
    first = kept("gan/dcgan-seed0")
    assert not (folder / "gan/wgan_gp-seed0/16x16/result.json").exists()

    process = begin()
    until_saved(process, "vae/vae-seed0")
    process.terminate()
    process.join(200)
    assert process.exitcode == 75, said.read_text()[-3000:]
    second = kept("gan/wgan_gp-seed0")
    assert not (folder / "vae/vae-seed0/16x16/result.json").exists()

    process = begin()
    process.join(400)
    assert process.exitcode == 0, said.read_text()[-3000:]
    assert kept("gan/dcgan-seed0") == first and kept("gan/wgan_gp-seed0") == second

    record = json.loads((folder / "study.json").read_text())
    codes = {
        run: [(one["step"], one["code"]) for one in attempts]
        for run, attempts in record["runs"].items()
    }
    once = [("train", 0), ("evaluate", 0), ("look", 0)]
    finals = [run for run in codes if run.startswith("final")]
    assert [run.split("-")[0] for run in finals] == ["final/gan"]
    assert codes.pop("gan/wgan_gp-seed0") == [("train", None), *once]
    assert codes.pop("vae/vae-seed0") == [("train", 75), *once]
    assert list(codes.values()) == [once] * 3
    for run in ("gan/wgan_gp-seed0", "vae/vae-seed0"):
        assert (folder / "logs" / f"{run}.log").read_text().count("resumed from") == 1
        result = json.loads((folder / run / "16x16" / "result.json").read_text())
        assert result["nimg"] == 960

    page = (folder / "report" / "index.html").read_text()
    told = (folder / "report" / "comparison.json").read_text()
    for run in record["runs"]:
        assert run in page or run.split("/")[1] in page
        assert run.split("/")[1] in told
        metric_values = json.loads((folder / run / "16x16" / "evaluation.json").read_text())[
            "measured"
        ]
        assert str(metric_values["fd_dinov2"]["value"])[:8] in told
    summary = (folder / "report" / "study.md").read_text()
    assert summary.count("| done |") == 5 and "What failed" not in summary
