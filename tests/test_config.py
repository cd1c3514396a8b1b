"""Configs: defaults, overrides, round trips, and one clear line for each mistake."""

import pytest
import yaml

from dinogen.config import Config, ConfigError, dump_config, load_config, parse_config

STAGES = [{"resolution": 4, "kimg": 1}, {"resolution": 8, "kimg": 2, "fade_kimg": 1}]


def complaint(data, overrides=()):
    with pytest.raises(ConfigError) as caught:
        parse_config(data, overrides, source="my.yaml")
    return str(caught.value)


def test_an_empty_file_is_the_default_config(tmp_path):
    path = tmp_path / "my.yaml"
    path.write_text("")
    assert load_config(path) == Config()


def test_what_is_dumped_reads_as_the_same_config():
    config = parse_config({"stages": STAGES, "family": {"name": "guided", "z_dim": 7}})
    assert parse_config(yaml.safe_load(dump_config(config))) == config


def test_overrides_win_and_reach_lists_and_options_of_the_family():
    config = parse_config(
        {"stages": STAGES, "seed": 1},
        ["stages.1.kimg=3.5", "seed=2", "family.z_dim=9", "engine.compile=true", "run=runs/a b"],
    )
    assert [stage.kimg for stage in config.stages] == [1, 3.5]
    assert (config.seed, config.engine.compile, str(config.run)) == (2, True, "runs/a b")
    assert config.family.options == {"z_dim": 9}


def test_items_of_a_list_that_the_file_lacks_are_those_of_the_defaults():
    config = parse_config(
        {}, ["stages.0.kimg=2", "optim.betas.0=0.5", "prepare.pyramids.grids.2=2"]
    )
    assert config.stages == (Config().stages[0].model_copy(update={"kimg": 2}),)
    assert config.optim.betas == (0.5, 0.99)
    assert config.prepare.pyramids.grids == (4, 8, 2)
    assert parse_config({}).stages == Config().stages
    assert "stages has items 0 to 0" in complaint({}, ["stages.1.kimg=2"])


def test_a_number_like_1e_4_is_a_number():
    assert parse_config({"stages": STAGES}, ["stages.0.lr=1e-4"]).stages[0].lr == 1e-4


@pytest.mark.parametrize(
    ("data", "line"),
    [
        (
            {"prepare": {"faces": {"aline": "box"}}},
            "my.yaml: unknown key 'prepare.faces.aline': did you mean 'align'?",
        ),
        (
            {"stages": [{"resolutoin": 4, "kimg": 1}]},
            "my.yaml: unknown key 'stages.0.resolutoin': did you mean 'resolution'?",
        ),
        (
            {"stages": [{"resolution": 4, "kimg": -1}]},
            "my.yaml: stages.0.kimg: Input should be greater than 0, not -1",
        ),
        (
            {"stages": [{"resolution": 6, "kimg": 1}]},
            "my.yaml: stages.0: resolution 6 is not a power of two: use 4, 8, 16, ...",
        ),
        (
            {"stages": [{"resolution": 4}]},
            "my.yaml: stages.0: the stage of resolution 4 has no length: give it kimg or epochs",
        ),
        (
            {"data": None},
            "my.yaml: data: is empty, but it is a section: indent its keys below it, "
            "or leave it out",
        ),
        ({"stages": 3}, "my.yaml: stages: must be a list, not 3"),
        (
            {"engine": {"precision": "fp8"}},
            "my.yaml: engine.precision: Input should be 'auto', 'fp32', 'bf16' or 'fp16', "
            "not 'fp8'",
        ),
    ],
)
def test_each_mistake_is_one_line_with_its_remedy(data, line):
    assert complaint(data) == line


def test_a_name_like_no_other_lists_the_valid_ones():
    assert complaint({"ema": {"qqqq": 1}}).endswith("valid keys: halflife_kimg, rampup")


def test_two_mistakes_are_two_lines():
    lines = complaint({"seed": -1, "sede": 3}).splitlines()
    assert [line.split(": ")[1] for line in lines] == ["seed", "unknown key 'sede'"]


def test_stages_have_to_double():
    data = {"stages": [{"resolution": 4, "kimg": 1}, {"resolution": 16, "kimg": 1}]}
    assert "stages [4, 16]: each stage must have twice" in complaint(data)


def test_a_fade_longer_than_its_stage_is_refused():
    data = {"stages": [{"resolution": 4, "kimg": 1, "fade_kimg": 2}]}
    assert "fade_kimg 2.0 is longer than the stage's kimg 1.0" in complaint(data)


@pytest.mark.parametrize(
    ("item", "text"),
    [
        ("seed", "write key=value"),
        ("=3", "write key=value"),
        ("stages.7.kimg=1", "stages has items 0 to 1"),
        ("stages.x.kimg=1", "stages has items 0 to 1"),
        ("seed.x=1", "seed is a single value"),
        ("seed=[1", "not valid YAML"),
    ],
)
def test_an_override_that_cannot_be_applied_is_named(item, text):
    found = complaint({"stages": list(STAGES), "seed": 1}, [item])
    assert f"override '{item}'" in found
    assert text in found


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"a: 1\nb: [1\nc: 2\n", "my.yaml:3: not valid YAML"),
        (b"seed: 1\nrun: x\nseed: 2\n", "my.yaml:3: not valid YAML: key 'seed' occurs twice"),
        (b"- 1\n", "a config is a mapping of keys, not a list"),
        (b"\xff\xfe\xfa", "cannot be read as text"),
        (b"run: !!python/object/apply:os.getcwd []\n", "could not determine a constructor"),
    ],
)
def test_a_file_that_is_no_config_is_named(tmp_path, content, text):
    path = tmp_path / "my.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert text in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_a_folder_is_no_config_and_hides_none_that_is_shipped(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("demo", "other"):
        (tmp_path / name).mkdir()
    with pytest.raises(ConfigError, match=r"^demo: it is a folder: .*, or demo\.yaml for"):
        load_config("demo")
    with pytest.raises(ConfigError, match=r"^other: it is a folder: give a YAML file$"):
        load_config("other")
    assert load_config("demo.yaml").guide.name == "onet"


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nope\.yaml: no such config file"):
        load_config(tmp_path / "nope.yaml")
