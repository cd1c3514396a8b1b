"""How a family is found: in the folder, in a file, as an entry point of a package."""

from importlib.metadata import EntryPoint

import pytest

from dinogen.config import ConfigError, FamilyConfig, parse_config
from dinogen.families import registry
from dinogen.families.base import Family
from dinogen.families.dcgan import Dcgan

ONE = """
from dinogen.families.dcgan import Dcgan

class Mine(Dcgan):
    class Options(Dcgan.Options):
        extra: int = 3
"""


def in_file(path):
    return registry.family_class(FamilyConfig(file=str(path)))


def test_each_file_of_the_folder_is_one():
    names = registry.family_names()
    assert {"guided", "dcgan", "ddpm"} <= set(names)
    assert not {"abilities", "base", "earlier", "gan", "registry"} & set(names)
    for name in names:
        assert issubclass(registry.family_class(FamilyConfig(name=name)), Family)


def test_a_file_of_ones_own(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(ONE)
    cls = in_file(path)
    assert issubclass(cls, Dcgan)
    assert cls.__name__ == "Mine"
    config = registry.resolve(parse_config({"family": {"file": str(path)}}))
    assert config.family.name == "mine"
    assert config.family.options["extra"] == 3
    assert registry.resolve(config) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1", "one subclass of Family; found: none"),
        (ONE + ONE.replace("Mine", "Other"), "found: Mine, Other"),
        ("import nothing_like_it", "cannot be imported: ModuleNotFoundError"),
        ("class X(:", "cannot be imported: SyntaxError"),
    ],
)
def test_bad_files_are_one_clear_error(tmp_path, text, message):
    path = tmp_path / "bad.py"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        in_file(path)


def test_no_file_and_two_names(tmp_path):
    with pytest.raises(ConfigError, match=r"family.file: .*gone.py is not a Python file"):
        in_file(tmp_path / "gone.py")
    with pytest.raises(ConfigError, match=r"name dcgan and file mine\.py contradict"):
        parse_config({"family": {"name": "dcgan", "file": "mine.py"}})


def test_an_entry_point_of_a_package(monkeypatch):
    point = EntryPoint("theirs", "dinogen.families.dcgan:Dcgan", registry.ENTRY_POINTS)
    monkeypatch.setattr(registry, "_offered", lambda: {"theirs": point})
    assert registry.family_class(FamilyConfig(name="theirs")) is Dcgan
    assert "theirs" in registry.family_names()


def test_a_misspelt_name_gets_the_nearest():
    with pytest.raises(ConfigError, match="unknown family 'dcgen': did you mean 'dcgan'"):
        registry.family_class(FamilyConfig(name="dcgen"))
