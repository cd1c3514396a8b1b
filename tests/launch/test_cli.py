"""The command line: instant help, one clear line for known errors, commands under headings."""

import io
import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from dinogen.errors import UserError
from dinogen.features.dinov2 import make_random_dinov2
from launch.cli import main
from launch.cli.console import setup_logging
from shards.errors import ManifestError

ROOT = Path(__file__).parents[2]
HELP_SECONDS = 0.5


def dinogen(*arguments, **variables):
    environment = {**os.environ, "DINOGEN_DEBUG": "", **variables}
    return subprocess.run(
        [sys.executable, "-m", "launch.cli", *map(str, arguments)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def loaded_by(*arguments):
    """What a command prints, and the packages that it has loaded."""
    code = (
        f"import sys; sys.argv = ['dinogen', *{arguments!r}]\n"
        "from launch.cli.main import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print(sorted({name.partition('.')[0] for name in sys.modules}), file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return done.stdout, set(done.stderr.replace("'", " ").replace(",", " ").split())


def test_help_loads_nothing_heavy():
    printed, loaded = loaded_by("--help")
    assert "Usage" in printed
    assert "typer" in loaded
    assert loaded & {"torch", "numpy", "transformers", "pydantic", "matplotlib", "PIL"} == set()


def test_the_status_of_jobs_loads_no_torch(tmp_path):
    (tmp_path / "config.yaml").write_text(
        f"run: {tmp_path}\nstages: [{{resolution: 4, kimg: 1}}]\n"
    )
    (tmp_path / "4x4").mkdir()
    (tmp_path / "4x4" / "stats.jsonl").write_text('{"nimg": 500}\n')
    for words in (("launch", "status", str(tmp_path)), ("shards", "verify", str(tmp_path))):
        assert "torch" not in loaded_by(*words)[1], words


def cpu_of_help():
    before = os.times()
    assert dinogen("--help").returncode == 0
    after = os.times()
    return after[2] + after[3] - before[2] - before[3]


def test_help_costs_little_cpu():
    assert min(cpu_of_help() for _ in range(3)) < HELP_SECONDS


def every_command(group=main.app, path=()):
    for command in group.registered_commands:
        yield (*path, main._name(command))
    for sub in group.registered_groups:
        yield from every_command(sub.typer_instance, (*path, sub.name))


@pytest.mark.parametrize("path", list(every_command()), ids=" ".join)
def test_every_command_explains_itself_by_an_example(path):
    result = CliRunner().invoke(main.app, [*path, "--help"], terminal_width=200)
    assert result.exit_code == 0, result.output
    assert "Example" in result.output
    assert f"dinogen {' '.join(path)}" in result.output


def test_every_command_has_its_heading():
    panels = {main._name(c): c.rich_help_panel for c in main.app.registered_commands}
    panels |= {str(g.name): g.rich_help_panel for g in main.app.registered_groups}
    assert set(panels.values()) <= set(main.PANELS)
    assert panels["train"] == "Train"
    assert panels["doctor"] == "Machine"


def test_a_known_error_is_one_line_and_no_traceback(tmp_path):
    done = dinogen("config", "show", tmp_path / "nope.yaml")
    assert done.returncode == 2
    assert done.stderr == f"dinogen: {tmp_path / 'nope.yaml'}: no such config file\n"
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "variables"), [(("--debug",), {}), ((), {"DINOGEN_DEBUG": "1"})]
)
def test_debug_shows_where_it_came_from(tmp_path, arguments, variables):
    done = dinogen(*arguments, "config", "show", tmp_path / "nope.yaml", **variables)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "read_mapping" in done.stderr


class TakesTwo(UserError):
    exit_code = 75


@pytest.mark.parametrize(
    ("error", "code"), [(UserError("a"), 2), (TakesTwo("b"), 75), (ManifestError("c"), 1)]
)
def test_errors_of_all_packages_are_known(monkeypatch, capsys, error, code):
    def fail():
        raise error

    monkeypatch.setattr(main, "app", fail)
    monkeypatch.delenv("DINOGEN_DEBUG", raising=False)
    with pytest.raises(SystemExit) as ended:
        main.main()
    assert ended.value.code == code
    assert capsys.readouterr().err == f"dinogen: {error}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ("train", "configs/demo.yaml", "run={}"),
        ("prepare", "{photos}", "{}"),
        ("faces", "{photos}", "{}/faces", "prepare.faces.detect=none"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_path_that_cannot_be_written_is_one_line(tmp_path, monkeypatch, capsys, arguments):
    """A file stands where a folder has to be."""
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "photos" / "a.png")
    make_random_dinov2(tmp_path / "guide", seed=0, hidden_size=16, num_layers=1, num_heads=2)
    file = tmp_path / "afile"
    file.write_text("x")
    typed = [item.format(file, photos=tmp_path / "photos") for item in arguments]
    typed += [f"guide.path={tmp_path / 'guide'}"]
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["dinogen", *typed])
    monkeypatch.delenv("DINOGEN_DEBUG", raising=False)
    with pytest.raises(SystemExit) as ended:
        main.main()
    assert ended.value.code in (1, UserError.exit_code)  # 1 where the system itself says it
    last = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(rf"dinogen: {file}\S*: .*: choose a writable folder.*", last), last
    assert file.read_text() == "x"


def test_an_error_of_the_system_without_a_path_keeps_its_traceback(monkeypatch):
    def fail():
        raise OSError("of nothing")

    monkeypatch.setattr(main, "app", fail)
    with pytest.raises(OSError, match="of nothing"):
        main.main()


def test_debug_shows_where_a_path_failed(monkeypatch, tmp_path):
    monkeypatch.setattr(main, "app", (tmp_path / "none" / "x").mkdir)
    monkeypatch.setenv("DINOGEN_DEBUG", "1")
    with pytest.raises(FileNotFoundError):
        main.main()


def test_an_error_of_ours_is_not_hidden(monkeypatch):
    def fail():
        raise ZeroDivisionError

    monkeypatch.setattr(main, "app", fail)
    with pytest.raises(ZeroDivisionError):
        main.main()


def test_a_misspelt_command_is_refused():
    done = dinogen("trian")
    assert done.returncode == 2
    assert "trian" in done.stderr


def test_the_version_is_that_of_the_package():
    from importlib.metadata import version

    assert dinogen("--version").stdout == f"dinogen {version('dinogen')}\n"


def test_doctor_speaks_json_and_finds_this_interpreter():
    done = dinogen("doctor", "--json", HF_HUB_OFFLINE="1")
    findings = {item["name"]: item for item in json.loads(done.stdout)}
    broken = [item for item in findings.values() if item["status"] == "broken"]
    assert broken == []
    assert done.returncode == 0
    assert ".".join(map(str, sys.version_info[:3])) in findings["Python"]["found"]


def test_a_log_file_has_whole_lines(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr("sys.stderr", stream)
    setup_logging()
    logging.getLogger("dinogen.test").warning("long %s end", "x" * 200)
    logging.getLogger("elsewhere").info("not ours")
    (line,) = stream.getvalue().splitlines()
    assert line.endswith(f"WARNING long {'x' * 200} end")
    stream.truncate(0)
    setup_logging(quiet=True)
    logging.getLogger("dinogen.test").warning("of another rank")
    assert "another rank" not in stream.getvalue()
    setup_logging()  # not to silence the tests that follow in this process
