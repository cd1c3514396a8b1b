"""The trials of a grid and of random search, compared with a naive enumeration."""

from __future__ import annotations

import itertools
import math

import pytest
import yaml

from dinogen.config import load_config
from dinogen.config.search import SearchConfig
from launch.study.trials import Trial, as_yaml, points


def search(parameters, **more):
    return SearchConfig.model_validate({"over": "a", "parameters": parameters} | more)


def test_a_grid_is_the_nested_loop_over_all_values():
    found = search(
        {
            "stages.0.lr": [1e-4, 3e-4],
            "family.z_dim": {"low": 8, "high": 32, "step": 8, "int": True},
            "augment.flip": {"low": 0, "high": 0.3, "step": 0.1},
            "optim.betas": [[0.0, 0.99], [0.5, 0.999]],
        },
        method="grid",
    )
    naive = [
        {"stages.0.lr": lr, "family.z_dim": z, "augment.flip": flip, "optim.betas": betas}
        for lr in (1e-4, 3e-4)
        for z in (8, 16, 24, 32)
        for flip in (0.0, 0.1, 0.2, 0.3)
        for betas in ([0.0, 0.99], [0.5, 0.999])
    ]
    assert list(points(found)) == naive
    assert found.num == len(naive) == 64


def test_random_trials_are_among_all_and_none_comes_twice():
    parameters = {"a": [1, 2, 3], "b": {"low": 0, "high": 1, "step": 0.25}, "c": ["x", "y"]}
    every = list(itertools.product((1, 2, 3), (0.0, 0.25, 0.5, 0.75, 1.0), ("x", "y")))
    found = [
        tuple(one.values()) for one in points(search(parameters, method="random", num_trials=30))
    ]
    assert sorted(found) == sorted(every)
    assert found != every
    again = search(parameters, method="random", num_trials=30)
    assert [tuple(one.values()) for one in points(again)] == found
    other = search(parameters, method="random", num_trials=30, seed=1)
    assert [tuple(one.values()) for one in points(other)] != found


def test_more_trials_leave_the_first_as_they_were():
    parameters = {"a": {"low": 1e-5, "high": 1e-1, "log": True}, "b": [1, 2]}
    few = list(points(search(parameters, num_trials=5)))
    many = list(points(search(parameters, num_trials=50)))
    assert many[:5] == few
    # neither does a further parameter
    more = list(points(search({**parameters, "c": [1, 2]}, num_trials=5)))
    assert [{"a": one["a"], "b": one["b"]} for one in more] == few


@pytest.mark.parametrize(
    ("parameter", "cdf"),
    [
        ({"low": 2, "high": 6}, lambda v: (v - 2) / 4),
        ({"low": 1e-5, "high": 1e-1, "log": True}, lambda v: (math.log10(v) + 5) / 4),
    ],
)
def test_random_values_follow_their_distribution(parameter, cdf):
    num = 2000
    values = sorted(cdf(one["a"]) for one in points(search({"a": parameter}, num_trials=num)))
    distance = max(abs(value - (i + 0.5) / num) for i, value in enumerate(values))
    assert distance < 1.63 / math.sqrt(num)  # Kolmogorov and Smirnov, 1 %


def test_whole_numbers_are_equally_likely_and_stay_in_their_range():
    one = search({"a": {"low": 1, "high": 4, "int": True}}, num_trials=4).parameters["a"]
    drawn = [one.at(i / 400) for i in range(400)]
    assert [drawn.count(value) for value in (1, 2, 3, 4)] == [100] * 4
    log = search({"a": {"low": 1, "high": 8, "int": True, "log": True}}, num_trials=4)
    drawn = [log.parameters["a"].at(i / 1000) for i in range(1000)]
    assert set(drawn) == set(range(1, 9)) and all(isinstance(one, int) for one in drawn)
    # the share of k is log of (k + 1/2) / (k - 1/2)
    for k in range(1, 9):
        share = math.log((k + 0.5) / (k - 0.5)) / math.log(8.5 / 0.5)
        assert abs(drawn.count(k) / 1000 - share) < 0.002


@pytest.mark.parametrize("choices", [[8, 8.0], [0, False], [[1, 2], [1.0, 2]], ["a", "b", "a"]])
def test_choices_that_are_equal_are_refused(choices):
    with pytest.raises(ValueError, match="list each choice once"):
        search({"a": choices}, method="random", num_trials=2)


def test_a_long_range_takes_neither_time_nor_memory():
    parameters = {
        "a": {"low": 1, "high": 10**12, "int": True},
        "b": {"low": 0, "high": 1, "step": 1e-6},
    }
    found = search(parameters, method="random", num_trials=3)
    assert found.num_points == 10**12 * (10**6 + 1)
    for values in points(found):
        assert isinstance(values["a"], int) and 1 <= values["a"] <= 10**12
        assert 0 <= values["b"] <= 1
    with pytest.raises(ValueError, match="1000000000000 trials are too many: at most 10000"):
        search({"a": parameters["a"]}, method="grid")


def test_values_reach_the_config_as_they_are(tmp_path):
    (tmp_path / "a.yaml").write_text(yaml.safe_dump({"stages": [{"resolution": 8, "kimg": 1}]}))
    values = {"stages.0.lr": 1e-5, "stages.0.batch": 32, "guide.layer": [1, 2], "data.path": "null"}
    config = load_config(tmp_path / "a.yaml", Trial(0, values).overrides)
    assert config.stages[0].lr == 1e-5 and config.stages[0].batch == 32
    assert config.guide.layer == (1, 2) and config.data.path == "null"
    assert all(yaml.safe_load(as_yaml(value)) == value for value in (1e-5, None, "1e-5", [1, "a"]))


def test_a_trial_is_named_by_its_number_and_its_values():
    values = {"stages.0.lr": 0.000123456, "stages.1.lr": 0.5, "family.name": "a/b c"}
    trial = Trial(7, values)
    assert trial.name("dcgan_64") == "dcgan_64-007-0_lr0.000123-1_lr0.5-namea_b_c"
    assert trial.words == "0_lr 0.000123, 1_lr 0.5, name a/b c"
    assert len(Trial(7, {f"k{i}": "word" * 9 for i in range(9)}).name("a")) < 80
