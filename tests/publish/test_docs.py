"""The commands and the code of docs/hub.md, as they stand there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from dinogen.config import dump_config, load_config
from launch.cli.main import app
from tests.hub_server import hub_server, use_hub

TEXT = (Path(__file__).parents[2] / "docs" / "hub.md").read_text(encoding="utf-8")
COMMANDS = [
    line
    for block in re.findall(r"^```bash\n(.*?)^```", TEXT, re.M | re.S)
    for line in block.splitlines()
]
(CODE,) = re.findall(r"^```python\n(.*?)^```", TEXT, re.M | re.S)


@pytest.fixture
def there(run, data_folder, tmp_path, monkeypatch):
    """A folder with what the page supposes, where user/faces is not published yet."""
    (tmp_path / "runs").mkdir()
    run.rename(tmp_path / "runs" / "first")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "faces").symlink_to(data_folder)
    config = load_config(tmp_path / "runs" / "first" / "config.yaml")
    (tmp_path / "my.yaml").write_text(dump_config(config))
    monkeypatch.chdir(tmp_path)
    with hub_server() as server:
        use_hub(monkeypatch, server, tmp_path / "home")
        yield server


def test_the_page(there, tmp_path):
    assert len(COMMANDS) == 5
    published = [line for line in COMMANDS if line.startswith("dinogen publish")]
    for line in [*published, *(one for one in COMMANDS if one not in published)]:
        words = shlex.split(line)
        assert words[0] == "dinogen"
        assert not app(words[1:], standalone_mode=False)
    assert there.repositories["models/user/faces"].private
    found: dict[str, object] = {}
    exec(compile(CODE, "hub.md", "exec"), found)
    assert found["images"].shape == (16, 3, 8, 8)
    commit = there.repositories["models/user/faces"].branches["main"]
    results = tmp_path / f"user--faces-{commit[:7]}"
    assert (results / "8x8" / "evaluation.json").is_file()
    assert (tmp_path / "runs" / "further" / "8x8" / "result.json").is_file()
    assert (tmp_path / "card" / "README.md").is_file()
