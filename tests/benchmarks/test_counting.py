"""What benchmarks/step.py counts without a GPU: known programs, each line as it is marked."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.benchmarks.programs import PROGRAMS
from tests.benchmarks.without_gpu import needs_fake_cuda

FILE = Path(__file__).with_name("programs.py")
KINDS = {"sync": "syncs", "waits": "waits", "blocking": "blocking", "copies": "copies"}
LAUNCH = 2e-6

pytestmark = needs_fake_cuda


@pytest.fixture(scope="module")
def counted():
    """Counts of all programs by their names."""
    done = subprocess.run(
        [sys.executable, FILE], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""}
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


def marked(name):
    """Lines of a program by what they are marked as."""
    text = FILE.read_text(encoding="utf-8")
    (body,) = (
        node
        for node in ast.parse(text).body
        if isinstance(node, ast.FunctionDef) and node.name == name
    )
    found = {kind: [] for kind in KINDS}
    for number, line in enumerate(text.splitlines(), 1):
        kind = line.rpartition("# ")[2]
        if body.lineno <= number <= body.end_lineno and kind in KINDS:
            found[kind].append(number)
    return found


@pytest.mark.parametrize("name", PROGRAMS)
def test_each_marked_line_is_counted_once_and_no_other(counted, name):
    for kind, lines in marked(name).items():
        named = counted[name][KINDS[kind]]
        assert {line.split()[0]: times for line, times in named.items()} == {
            f"programs.py:{number}": 1 for number in lines
        }, kind


@pytest.mark.parametrize(
    ("name", "launches"),
    [
        ("three operators", 3),
        ("views", 0),
        ("nothing is written", 0),
        ("a matrix product", 1),
        ("a convolution", 1),
        ("many tensors at once", 3),
        ("attention", 1),
    ],
)
def test_launches(counted, name, launches):
    assert counted[name]["launches"] == launches


@pytest.mark.parametrize("name", ["attention by operators", "attention of columns"])
def test_attention_is_one_launch_only_where_a_gpu_makes_it_one(counted, name):
    assert counted[name]["launches"] > 3


def test_flops_and_bytes_follow_from_the_shapes(counted):
    matrices = counted["a matrix product"]
    assert matrices["flops"] == 2 * 32 * 64 * 16
    assert matrices["moved"] == 4 * (32 * 64 + 64 * 16 + 32 * 16)
    assert counted["a convolution"]["flops"] == 2 * (2 * 5 * 8 * 8) * (3 * 3 * 3)
    assert counted["attention"]["flops"] == 2 * 2 * (2 * 4) * 16 * 16 * 32
    assert counted["attention by operators"]["flops"] == counted["attention"]["flops"]


def test_time_is_the_longest_of_flops_bytes_and_a_launch(counted):
    """At 1e12 FLOP/s and 1e9 bytes/s."""
    matrices = counted["a matrix product"]
    assert matrices["seconds"] == pytest.approx(matrices["moved"] / 1e9)
    assert matrices["mfu"] == pytest.approx(matrices["flops"] / 1e12 / matrices["seconds"])
    assert counted["many tensors at once"]["seconds"] == pytest.approx(3 * LAUNCH)


def test_memory_rises_and_falls_with_the_tensors(counted):
    megabytes = 4 * 1000 * 1000
    assert megabytes <= counted["memory"]["peak"] < megabytes + 100_000
    assert counted["memory"]["left"] == 0


def test_without_a_compiler_the_command_says_what_to_install(tmp_path):
    script = Path(__file__).parents[2] / "benchmarks" / "step.py"
    there = {**os.environ, "PATH": str(tmp_path), "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, script, "dcgan_64"], env=there, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "apt-get install g++" in done.stderr
