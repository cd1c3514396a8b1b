"""docs/import.md: each of its commands, in its order; and what the command line says otherwise."""

import re
import shlex
from pathlib import Path

import pytest

from dinogen.hub import HubError
from launch.cli import main
from tests.families.tiny import pack_discs
from tests.formats import nvlabs
from tests.hub_server import hub_server, use_hub

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "import.md").read_text(encoding="utf-8")
COMMANDS = [
    shlex.split(line)[1:]
    for block in re.findall(r"^```bash\n(.*?)^```", TEXT, re.M | re.S)
    for line in block.replace("\\\n", " ").splitlines()
    if line.startswith("dinogen ")
]
# instead of what the page says, so that it takes seconds
SMALLER = {"stages.0.kimg=1000": "stages.0.kimg=0.016"}


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DINOGEN_DEBUG", raising=False)
    return tmp_path


def dinogen(*arguments):
    main.app([*map(str, arguments)], standalone_mode=False)


def test_the_commands_of_the_page_run_in_their_order(here, capsys):
    pack_discs(here / "data" / "faces")
    data = nvlabs.snapshot(16, z_dim=8, w_dim=8)
    (here / "network-snapshot-000200.pkl").write_bytes(nvlabs.dumps(data))
    assert [command[0] for command in COMMANDS] == ["import", "sample", "look", "train"]
    for command in COMMANDS:
        smaller = [SMALLER.get(word, word) for word in command]
        more = ["stages.0.batch=8"] if command[0] == "train" else []
        dinogen(*smaller, *more)
    said = capsys.readouterr().out
    assert "dinogen train runs/imported/config.yaml run=NEW init_from=runs/imported" in said
    first = here / "runs" / "transfer" / "16x16" / "samples" / "000000000.png"
    assert first.is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("stylegan2", "missing.pkl", "out"), "missing.pkl: there is no such file"),
        (("stylegan2", "page.html", "out"), "page.html: is no pickle"),
        (("stylegan2", "page.html", "full"), "full exists already"),
    ],
)
def test_mistakes_get_one_line(here, capsys, monkeypatch, arguments, message):
    (here / "page.html").write_text("<html>")
    (here / "full").mkdir()
    (here / "full" / "file").touch()
    monkeypatch.setattr("sys.argv", ["dinogen", "import", *arguments])
    with pytest.raises(SystemExit) as error:
        main.main()
    assert error.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("dinogen: ")
    assert message in line
    assert not (here / "out").exists()


@pytest.mark.parametrize("kind", ["stylegan2", "guided-diffusion"])
def test_of_a_repository_a_file_is_asked(here, capsys, monkeypatch, kind):
    more = ["--image-size", "16"] if kind == "guided-diffusion" else []
    with hub_server() as server:
        use_hub(monkeypatch, server, here / "home")
        server.add("user/sg", {"v1.0/page.pkl": b"<html>"})
        for address, message in [
            ("hf://user/sg", "hf://user/sg: is no file: name the file of weights"),
            ("hf://user/sg/v1.0", "hf://user/sg/v1.0: is a folder: name the file of weights"),
        ]:
            with pytest.raises(HubError, match=re.escape(message)):
                dinogen("import", kind, address, "out", *more)
