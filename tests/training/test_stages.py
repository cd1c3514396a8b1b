"""The plan of a stage, and what is due when."""

import pytest

from dinogen.config import (
    ConfigError,
    StageConfig,
    StagePlan,
    due,
    find_stage,
    parse_config,
    with_lengths,
)


def test_alpha_rises_in_a_line_and_then_everything_trains():
    plan = StagePlan(StageConfig(resolution=8, kimg=2, fade_kimg=1), start=5000)
    assert [plan.alpha(n) for n in (5000, 5250, 5999, 6000, 7000)] == [0, 0.25, 0.999, 1, 1]
    assert [plan.fading(n) for n in (5000, 5999, 6000)] == [True, True, False]
    assert plan.end == 7000


def test_lr_rises_to_its_whole_and_falls_to_a_batch_s_share():
    stage = StageConfig(resolution=8, kimg=1, batch=100, warmup_kimg=0.4, decay_kimg=0.5)
    plan = StagePlan(stage, start=5000)
    shares = [plan.lr_factor(nimg) for nimg in range(5000, 6000, 100)]
    assert shares == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 0.8, 0.6, 0.4, 0.2])
    assert StagePlan(StageConfig(resolution=8, kimg=1), 0).lr_factor(999) == 1
    with pytest.raises(ValueError, match="warmup_kimg"):
        StageConfig(resolution=8, kimg=1, warmup_kimg=0.6, decay_kimg=0.5)


def test_a_stage_without_fade_in_never_fades():
    plan = StagePlan(StageConfig(resolution=4, kimg=2), start=0)
    assert plan.alpha(0) == 1 and not plan.fading(0)


def test_due_counts_multiples_regardless_of_the_batch():
    for batch in (1, 7, 64, 300):
        clock = range(0, 10_000, batch)
        passed = sum(due(n, n + batch, 0.5) for n in clock)
        assert passed == (clock[-1] + batch) // max(500, batch) or batch > 1
        # every multiple of 500 is met by exactly one step, several may share it
        for multiple in range(500, 10_000, 500):
            assert sum(n < multiple <= n + batch and due(n, n + batch, 0.5) for n in clock) == 1


def test_an_unknown_stage_names_those_there_are():
    config = parse_config({"stages": [{"resolution": 4, "kimg": 1}, {"resolution": 8, "kimg": 1}]})
    assert find_stage(config, 8) == 1
    with pytest.raises(ConfigError, match=r"stage 16 .*\[4, 8\]"):
        find_stage(config, 16)


def test_epochs_are_lengths_of_the_data():
    stages = [{"resolution": 4, "epochs": 3}, {"resolution": 8, "kimg": 1, "epochs": 9}]
    config = parse_config({"stages": stages, "eval": {"every_epochs": 0.5}})
    found = with_lengths(config, 200)
    assert [stage.num_images for stage in found.stages] == [600, 1000]
    assert found.eval.every_kimg == pytest.approx(0.1)
    assert with_lengths(found, 999) == found, "what is written out stays"
    with pytest.raises(ConfigError, match="no samples in split train"):
        with_lengths(config, 0)
    stages[1] = {"resolution": 8, "epochs": 2, "fade_kimg": 1}
    with pytest.raises(ConfigError, match=r"fade_kimg 1\.0 is longer"):
        with_lengths(parse_config({"stages": stages}), 200)
