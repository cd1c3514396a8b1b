"""Files of a run as kills, editors and other versions leave them: what is sound stays."""

import json
import math
import os

import pytest

from dinogen.runs import files
from dinogen.runs.files import read_stats
from dinogen.runs.values import finite

READERS = [
    files.read_text,
    files.read_object,
    files.read_lines,
    files.read_result,
    files.read_evaluation,
    files.read_metrics,
    files.read_visualizations,
    files.read_attempts,
    files.read_config,
    files.read_state,
]
CONTENTS = {
    "empty": b"",
    "blank": b" \n\n",
    "bytes that are no text": b'\xff\xfe{"nimg": 1}\n',
    "UTF-16": '{"nimg": 1}\n'.encode("utf-16"),
    "zeros of a power cut": bytes(512),
    "cut": b'{"nimg": 12, "metr',
    "a list": b"[1, 2]",
    "a number": b"7",
    "text": b'"text"',
    "null": b"null",
    "many brackets": b"[" * 100_000,
    "many objects": b'{"a":' * 100_000,
    "many digits": b'{"nimg": ' + b"9" * 6000 + b"}",
    "too large": b'{"nimg": 1e999, "seconds": -1e400, "value": 123456789012345678901234567890}',
    "no numbers": b'{"nimg": NaN, "seconds": Infinity, "start": -Infinity}',
    "half a surrogate pair": b'{"nimg": 3, "family": "\\ud800", "\\udfff": 1, "device": "\\udc00"}',
    "wrong kinds": b'{"nimg": "many", "files": [], "measured": 3, "metrics": {"a": {}}}',
    "YAML of other things": b"? [a, b]\n: 1\n",
    "a date that is none": b"seed: 2024-13-45\n",
    "an endless YAML": b"a: &a [1,1,1,1,1,1,1,1,1,1]\n"
    + b"".join(
        f"{chr(98 + n)}: &{chr(98 + n)} [{','.join([f'*{chr(97 + n)}'] * 10)}]\n".encode()
        for n in range(9)
    ),
    "a YAML of itself": b"a: &a [*a]\n",
    "a tag": b"family: !!python/object/apply:os.system ['true']\n",
    "tabs": b"family:\n\tname: dcgan\n",
}


@pytest.mark.parametrize("read", READERS, ids=lambda read: read.__name__)
@pytest.mark.parametrize("name", CONTENTS)
def test_nothing_that_a_file_holds_raises(tmp_path, read, name):
    path = tmp_path / "file"
    path.write_bytes(CONTENTS[name])
    found = read(path)
    assert found.there
    # what is given on can be written as JSON and as UTF-8, and its problems too
    json.dumps([found.value, found.messages()], allow_nan=False, ensure_ascii=False).encode("utf-8")


@pytest.mark.parametrize("read", READERS, ids=lambda read: read.__name__)
def test_what_stands_in_the_place_of_a_file_is_a_problem(tmp_path, read):
    assert not read(tmp_path / "nothing").there
    assert not read(tmp_path / "nothing").problems
    (tmp_path / "folder").mkdir()
    assert "it is a folder" in read(tmp_path / "folder").messages()[0]
    os.mkfifo(tmp_path / "pipe")
    assert "not a regular file" in read(tmp_path / "pipe").messages()[0]
    (tmp_path / "loop").symlink_to("loop")
    assert read(tmp_path / "loop").problems
    (tmp_path / "dangling").symlink_to("nowhere")
    assert not read(tmp_path / "dangling").there


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_a_problem(tmp_path):
    path = tmp_path / "result.json"
    path.write_text("{}")
    path.chmod(0)
    assert "Permission denied" in files.read_result(path).messages()[0]


def test_one_bad_line_costs_that_line(tmp_path):
    path = tmp_path / "stats.jsonl"
    rows = [b'{"nimg": %d, "loss": 0.5}' % nimg for nimg in (1, 2, 3, 4)]
    rows[1] = b'{"nimg": 2, "loss": 0.5\xff}'
    path.write_bytes(b"\n".join(rows) + b'\n{"nimg": 5, "lo')
    found = files.read_lines(path)
    assert [line["nimg"] for line in found.value] == [1, 3, 4]
    assert found.messages(tmp_path)[0].startswith("stats.jsonl: line 2 is left out: not UTF-8 text")
    assert "0xff" in found.messages()[0] and "line 5 is left out" in found.messages()[1]
    assert read_stats(path) == found.value


def test_what_is_sound_beside_what_is_not_stays(tmp_path):
    path = tmp_path / "result.json"
    given = {
        "nimg": "many",
        "seconds": 3.5,
        "files": {"final": "../../etc/passwd", "real": "r.png"},
    }
    path.write_text(json.dumps(given | {"of a later version": [1]}))
    found = files.read_result(path)
    assert found.value == {
        "seconds": 3.5,
        "files": {"real": "r.png"},
        "of a later version": [1],
    }
    assert found.messages(tmp_path) == [
        "result.json: nimg: 'many' is not a whole number >= 0",
        "result.json: files: final: '../../etc/passwd' is not a file in this folder",
    ]


def test_a_value_is_a_number_or_none(tmp_path):
    path = tmp_path / "evaluation.json"
    measured = {
        "fid": {"value": 3.5, "better": "lower", "num_samples": 5, "from a later version": 1},
        "kid": {"value": "3.5"},
        "is": 4,
        "faces": None,
        "recall": {"value": 0.5, "spread": -1, "better": "up"},
    }
    path.write_text(json.dumps({"measured": measured, "fingerprints": {"a": 3, "b": {}}}))
    found = files.read_evaluation(path)
    assert found.value is not None
    assert set(found.value["measured"]) == {"fid", "recall"}
    assert found.value["measured"]["recall"]["spread"] is None
    assert found.value["measured"]["fid"]["value"] == 3.5
    assert found.value["fingerprints"] == {"b": {}}
    said = "; ".join(found.messages())
    for name in ("kid", "is", "faces", "recall"):
        assert f"measured: {name}: " in said


def test_numbers_that_no_one_can_have_meant():
    for value in (10**400, math.nan, math.inf, True, "3", None, [1]):
        assert finite(value) is None
    assert finite(3) == 3.0


def test_a_config_of_any_version_is_read_section_by_section(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("notes: some text\nfamily: dcgan\nseed: 3\nnew: {key: .nan}\nstages: 4\n")
    found = files.read_config(path)
    assert found.value == {"seed": 3, "new": {"key": None}}
    assert [one.split(": ")[1] for one in found.messages(tmp_path)] == ["notes", "family", "stages"]
