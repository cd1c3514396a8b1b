"""``dinogen config``: what it prints is a config again; the schema agrees with the code."""

import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from dinogen.config import StageConfig, load_config, parse_config
from dinogen.families.registry import resolve
from launch.cli.main import app

CONFIGS = Path(__file__).parents[2] / "configs"


def run(*arguments):
    result = CliRunner().invoke(app, ["config", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_the_shown_config_is_whole_and_reads_as_the_same(tmp_path):
    path = tmp_path / "my.yaml"
    path.write_text("stages: [{resolution: 4, kimg: 2}]\nfamily: {z_dim: 9}\n")
    shown = yaml.safe_load(run("show", path, "seed=3"))
    assert shown["seed"] == 3
    assert shown["stages"][0]["lr"] == 1e-3
    assert shown["family"]["z_dim"] == 9
    assert len(shown["family"]) > 3
    assert parse_config(shown) == resolve(load_config(path, ["seed=3"]))


def test_the_schema_in_the_repository_is_that_of_the_code():
    assert (CONFIGS / "schema.json").read_text(encoding="utf-8") == run("schema"), (
        "run: dinogen config schema configs/schema.json"
    )


def test_the_page_of_all_keys_is_that_of_the_code():
    page = (CONFIGS.parent / "docs" / "config-reference.md").read_text(encoding="utf-8")
    assert page == run("reference"), "run: dinogen config reference docs/config-reference.md"
    for key in ("`kimg`", "`keep_every_kimg`", "`z_dim`", "`num_slices`", "`from_resolution`"):
        assert key in page


def test_each_key_is_shown_below_what_the_schema_says_of_it(tmp_path):
    path = tmp_path / "my.yaml"
    path.write_text(
        "stages: [{resolution: 4, kimg: 2}, {resolution: 8, kimg: 2}]\n"
        "guides: {colour: {name: pixels}}\n"
    )
    lines = run("show", path).splitlines()
    for key, words in {
        "seed": "seed of all random numbers",
        "  - weight": "factor in the sum",
        "  z_dim": "size of the latent",
        "- resolution": "pixels; 4, 8, 16, ...",
        "    layer": "which layer, or a list",
    }.items():
        found = [i for i, line in enumerate(lines) if line.startswith(f"{key}:")]
        assert any(words in "".join(lines[i - 3 : i]) for i in found), key
    keys = [i for i, line in enumerate(lines) if line.strip() and not line.lstrip().startswith("#")]
    bare = [lines[i].split(":")[0].strip(" -") for i in keys if "#" not in lines[i - 1]]
    # items after the first are as the first; a key without a description would be here too
    assert set(bare) <= {"resolution", *StageConfig.model_fields, "name", "file"}


def test_the_schema_is_written_where_asked(tmp_path):
    run("schema", tmp_path / "schema.json")
    assert json.loads((tmp_path / "schema.json").read_text()) == json.loads(run("schema"))


def test_the_schema_knows_keys_units_and_options_of_the_family():
    schema = json.loads(run("schema"))
    stage = schema["$defs"]["StageConfig"]
    assert stage["additionalProperties"] is False
    assert stage["required"] == ["resolution"]
    (guided,) = [
        family
        for family in schema["properties"]["family"]["oneOf"]
        if family["properties"].get("name", {}).get("const") == "guided"
    ]
    assert "z_dim" in guided["properties"]
    assert guided["additionalProperties"] is False


# A study is a plan of runs, not one of them.
RUNS = [path for path in sorted(CONFIGS.glob("*.yaml")) if "stages:" in path.read_text("utf-8")]


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.name)
def test_every_config_of_the_repository_is_valid_and_names_the_schema(path):
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert first == "# yaml-language-server: $schema=schema.json"
    resolve(load_config(path))
