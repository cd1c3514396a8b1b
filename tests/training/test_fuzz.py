"""Several ranks in every problem, by benchmarks/fuzz.py; and that it would see a fault."""

from __future__ import annotations

import dataclasses

import pytest

from tests.training.benchmarks import FOLDER, benchmark  # noqa: F401


def test_every_problem_ends_with_the_right_result_or_the_right_error(benchmark):  # noqa: F811
    printed = benchmark("fuzz", "--cases", "6")  # tests/stress has eight of all twelve kinds
    assert "6 cases, 0 wrong" in printed


def test_what_is_not_right_is_seen(benchmark, tmp_path, monkeypatch):  # noqa: F811
    """Cases whose ranks do not do what is expected of them."""
    import fuzz
    import fuzz_cases

    monkeypatch.setattr(fuzz, "FAILS_WITHIN", 1.0)
    config = {"batch": 4, "steps": 3, "last": False, "two_stages": False}
    base = fuzz_cases.Case(0, "any", "train", 2, ("ddp", 1), False, (5, 1), config=config)
    fault = fuzz_cases.Fault("loss", "RuntimeError", 1, 1)
    slow = dataclasses.replace(fault, how="slow")
    runner = fuzz.Fuzz(tmp_path)

    def run(number, **changes):
        return runner.run(dataclasses.replace(base, number=number, **changes))

    assert run(0) == "same result"
    for number, changes, wrong in (
        (1, {"error": "never said"}, "^exit codes"),
        (2, {"error": "never said", "fault": fault}, "^rank 0 does not say 'never said'"),
        (3, {"fault": fault}, "^exit codes"),
        (4, {"error": "never said", "fault": slow}, "^hangs:"),
    ):
        with pytest.raises(fuzz.Violation, match=wrong):
            run(number, **changes)


def test_two_hundred_cases_meet_every_kind_and_place(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import fuzz_cases

    assert len(fuzz_cases.KINDS) == 12
    cases = [fuzz_cases.draw(0, number) for number in range(200)]
    assert cases == [fuzz_cases.draw(0, number) for number in range(200)]
    assert {case.kind for case in cases} == set(fuzz_cases.KINDS)
    assert {case.fault.place for case in cases if case.fault} == set(fuzz_cases.PLACES)
    assert {(case.size, case.engine) for case in cases} == {
        (size, engine) for size in (2, 3) for engine in fuzz_cases.ENGINES
    }
    assert {sum(case.train) for case in cases} >= {1, 2, 3}
    assert {case.work for case in cases if case.corrupt} == {"train", "evaluate"}
