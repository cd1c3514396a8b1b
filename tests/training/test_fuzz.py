"""Several ranks in every trouble, by benchmarks/fuzz.py; and that it would see a fault."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

# Cases whose ranks do not do what is expected of them.
WRONG = """
import dataclasses, pathlib, sys, tempfile
import fuzz, fuzz_cases, ranks

if __name__ == "__main__":
    ranks.preload(deepspeed=False)
    config = {"batch": 4, "steps": 3, "last": False, "two_stages": False}
    base = fuzz_cases.Case(0, "any", "train", 2, ("ddp", 1), False, (5, 1), config=config)
    fault = fuzz_cases.Fault("loss", "RuntimeError", 1, 1)
    cases = {
        "right error expected": {"error": "never said"},
        "other error expected": {"error": "never said", "fault": fault},
        "right result expected": {"fault": fault},
        "hangs": {"error": "never said", "fault": dataclasses.replace(fault, how="slow")},
        "none": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        runner = fuzz.Fuzz(pathlib.Path(folder))
        fuzz.FAILS_WITHIN = 1.0
        for number, (name, changes) in enumerate(cases.items()):
            try:
                found = runner.run(dataclasses.replace(base, number=number, **changes))
            except fuzz.Violation as violation:
                found = f"WRONG {violation}".splitlines()[0]
            print(f"{name}: {found}")
"""


def run(*command: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *command],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(BENCHMARKS)},
        capture_output=True,
        text=True,
        timeout=290,
        check=False,
    )


@pytest.mark.timeout(300)
def test_every_trouble_ends_with_the_right_result_or_the_right_error():
    done = run(str(BENCHMARKS / "fuzz.py"), "--cases", "16")
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert "16 cases, 0 wrong" in done.stdout


def test_what_is_not_right_is_seen(tmp_path):
    script = tmp_path / "wrong.py"
    script.write_text(WRONG)
    done = run(str(script))
    lines = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    assert lines.pop("none") == "same result", done.stdout + done.stderr
    assert {name: text.partition("[")[0].strip() for name, text in lines.items()} == {
        "right error expected": "WRONG exit codes",
        "other error expected": "WRONG rank 0 does not say 'never said'",
        "right result expected": "WRONG exit codes",
        "hangs": "WRONG hangs:",
    }


def test_two_hundred_cases_meet_every_kind_and_place(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import fuzz_cases

    cases = [fuzz_cases.draw(0, number) for number in range(200)]
    assert cases == [fuzz_cases.draw(0, number) for number in range(200)]
    assert {case.kind for case in cases} == set(fuzz_cases.KINDS)
    assert {case.fault.place for case in cases if case.fault} == set(fuzz_cases.PLACES)
    assert {(case.size, case.engine) for case in cases} == {
        (size, engine) for size in (2, 3) for engine in fuzz_cases.ENGINES
    }
    assert {sum(case.train) for case in cases} >= {1, 2, 3}
    assert {case.work for case in cases if case.corrupt} == {"train", "evaluate"}
