"""log.profile: one trace of a few steps, which names the phases, and is made once in a run."""

from __future__ import annotations

import json

from dinogen.training.run import train

from .helpers import curve, stage, weights

LONG = "stages=[{resolution: 8, kimg: 0.12, batch: 8, lr: 0.003}]"
SHORT = "stages=[{resolution: 8, kimg: 0.06, batch: 8, lr: 0.003}]"


def traces(config):
    return sorted(config.run.rglob("*trace*"))


def names(path):
    return [event.get("name") for event in json.loads(path.read_text())["traceEvents"]]


def test_a_trace_of_the_steps_that_were_asked_for(make_config, caplog):
    caplog.set_level("INFO", "dinogen.training.logging.profile")
    config = make_config(SHORT, "log.profile={at_kimg: 0.01}")
    train(config)
    (path,) = traces(config)
    # What TensorBoard's plugin looks for.
    assert path.parent == stage(config, 8) / "tb"
    assert path.name.endswith(".pt.trace.json")
    assert str(path) in caplog.text
    found = names(path)
    steps = [name for name in found if str(name).startswith("ProfilerStep#")]
    assert sorted(steps) == [f"ProfilerStep#{number}" for number in range(5)]
    assert found.count("G") == 5
    assert any("aten::" in str(name) for name in found)


def test_it_changes_no_number(make_config):
    plain = make_config(SHORT)
    traced = make_config(SHORT, "log.profile={at_kimg: 0, steps: 3}", run="traced")
    train(plain)
    train(traced)
    assert not traces(plain)
    assert len(traces(traced)) == 1
    assert curve(traced, 8) == curve(plain, 8)
    ours, theirs = weights(traced, 8), weights(plain, 8)
    assert all(ours[name].equal(theirs[name]) for name in theirs)


def test_a_resumed_run_makes_none_again(make_config):
    asked = "log.profile={at_kimg: 0.016, steps: 2}"
    config = make_config(SHORT, asked)
    train(config)
    (path,) = traces(config)
    before = path.stat().st_mtime_ns
    train(make_config(LONG, asked, run=str(config.run)))
    assert traces(config) == [path]
    assert path.stat().st_mtime_ns == before


def test_a_stage_that_ends_earlier_gives_the_steps_there_were(make_config):
    config = make_config(SHORT, "log.profile={at_kimg: 0.05, steps: 5}")
    train(config)
    (path,) = traces(config)
    assert names(path).count("G") == 1
