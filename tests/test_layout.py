"""The house rules that no linter knows: which way imports run, who may know what."""

import ast
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

from tests.conftest import FIRST, QUICK, SLOW
from tests.runs.spelled_out import spelled_out

ROOT = Path(__file__).parents[1]
PACKAGES = ("shards", "dinogen", "launch")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
MAX_LINES = 600
MAX_MODULES = 16

# What each part may import of ours, besides itself and the basics below. A part that is not
# listed here fails, so that a new one has to find its place first.
BASICS = {
    "dinogen",
    "dinogen.batch",
    "dinogen.config",
    "dinogen.errors",
    "dinogen.files",
    "dinogen.hub",
    "dinogen.distributed.rng",
    "dinogen.runs.layout",
    "dinogen.transfer",
    "dinogen.version",
    "dinogen._torchvision",
}
MAY_IMPORT = {
    "dinogen.distributed": set(),
    # an autoencoder that encodes images for the data is a network of ours
    "dinogen.features": {"dinogen.networks"},
    "dinogen.networks": set(),
    "dinogen.losses": set(),
    "dinogen.diffusion": set(),
    "dinogen.runs": {"dinogen.distributed"},
    "dinogen.report": {"dinogen.runs"},
    "dinogen.prepare": {"dinogen.features", "dinogen.distributed"},
    "dinogen.metrics": {
        "dinogen.distributed",
        "dinogen.features",
        "dinogen.runs.fingerprint",
        "dinogen.runs.values",
        "dinogen.report.images",
        "dinogen.report.progress",
    },
    "dinogen.guidance": {
        "dinogen.diffusion",
        "dinogen.distributed",
        "dinogen.features",
        "dinogen.losses",
        "dinogen.networks",
    },
    "dinogen.families": {
        "dinogen.features",
        "dinogen.guidance",
        "dinogen.networks",
        "dinogen.losses",
        "dinogen.diffusion",
    },
    "dinogen.training": {
        "dinogen.families.abilities",
        "dinogen.families.base",
        "dinogen.families.registry",
        "dinogen.distributed",
        "dinogen.metrics.registry",
        "dinogen.report",
        "dinogen.runs",
        # the only way up: what is measured while a stage trains
        "dinogen.evaluation.validate",
    },
    "dinogen.formats": {
        "dinogen.diffusion",
        "dinogen.families.abilities",
        "dinogen.families.base",
        "dinogen.families.registry",
        "dinogen.networks",
        "dinogen.runs",
        "dinogen.training",
    },
    "dinogen.evaluation": {
        "dinogen.families.abilities",
        "dinogen.families.base",
        "dinogen.distributed",
        "dinogen.metrics",
        "dinogen.report.images",
        "dinogen.runs",
        "dinogen.training",
    },
    "dinogen.projection": {
        "dinogen.distributed",
        "dinogen.evaluation.record",
        "dinogen.families.abilities",
        "dinogen.families.base",
        "dinogen.features",
        "dinogen.metrics.extractors",
        "dinogen.prepare",
        "dinogen.report.images",
        "dinogen.report.video",
        "dinogen.runs",
        "dinogen.training",
    },
    "dinogen.visualize": {
        "dinogen.projection.latents",
        "dinogen.report.video",
        "dinogen.evaluation.record",
        "dinogen.families.abilities",
        "dinogen.families.base",
        "dinogen.distributed",
        "dinogen.metrics",
        "dinogen.report.images",
        "dinogen.runs",
        "dinogen.training",
    },
    "dinogen.publish": {
        "dinogen.metrics.value",
        "dinogen.report.images",
        "dinogen.runs",
        "dinogen.training",
    },
    "dinogen.serve": {
        "dinogen.distributed",
        "dinogen.families.abilities",
        "dinogen.families.base",
        "dinogen.report.images",
        "dinogen.training",
        "dinogen.visualize.drawings",
    },
}
# Only dinogen/runs spells out names in the folder of a run, see tests/runs/spelled_out.py: others
# ask `Run` and `Stage`, or take the constants of dinogen/runs/layout.py.
NOT_OF_A_RUN = {
    ("dinogen.demo", "index.html"),  # the page of the demo, above its two runs
    ("dinogen.report.compare", "index.html"),  # the page of a comparison
    ("dinogen.prepare.export_pt", "RxR"),  # a level of the exchange format
    ("launch.cli.shards", "RxR"),  # the size of images
}
HEAVY = {"torch", "torchvision", "transformers", "deepspeed", "facenet_pytorch"}
STARTUP = HEAVY | {"numpy", "PIL", "matplotlib", "pydantic", "jinja2", "huggingface_hub", "yaml"}


@cache
def tree(path):
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def module(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module(path) for path in FILES}


def imports(path, nodes=None):
    """Modules that a file imports, anywhere in it: ours by their full name."""
    found = set()
    for node in ast.walk(tree(path)) if nodes is None else nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else node.module for name in names}
    return found


def ours(path):
    return {name for name in imports(path) if name.partition(".")[0] in PACKAGES}


def inside(name, part):
    return name == part or name.startswith(part + ".")


def part_of(name):
    """``dinogen.features.checkpoint`` -> ``dinogen.features``."""
    return ".".join(name.split(".")[:2])


def under(*folders):
    return [path for folder in folders for path in FILES if (ROOT / folder) in path.parents]


def name_of(path):
    return str(path.relative_to(ROOT))


def test_the_files_are_found():
    assert {
        "launch.cli",
        "dinogen.config",
        "dinogen.training.trainer",
        "shards.read.order",
    } <= MODULES


@pytest.mark.parametrize("path", under("shards"), ids=name_of)
def test_shards_imports_nothing_of_ours_and_no_model(path):
    assert {name for name in ours(path) if not inside(name, "shards")} == set()
    foreign = {name.partition(".")[0] for name in imports(path)}
    assert foreign & (HEAVY - {"torch"}) == set()


@pytest.mark.parametrize("path", under("dinogen"), ids=name_of)
def test_dinogen_does_not_know_how_it_is_started(path):
    assert {name for name in ours(path) if inside(name, "launch")} == set()


@pytest.mark.parametrize("path", under("dinogen"), ids=name_of)
def test_imports_inside_dinogen_run_one_way(path):
    here = module(path)
    part = part_of(here)
    if here == "dinogen":
        return  # the public API names what it offers
    if any(inside(here, basic) for basic in BASICS - {"dinogen"}):
        wrong = {
            name
            for name in ours(path)
            if inside(name, "dinogen") and not any(inside(name, b) for b in BASICS - {"dinogen"})
        } - {"dinogen"}
    elif part == "dinogen.demo":
        wrong = set()  # the demo stands above all of it, as a user does
    else:
        allowed = BASICS | MAY_IMPORT[part] | {part}
        wrong = {
            name
            for name in ours(path)
            if inside(name, "dinogen") and not any(inside(name, ok) for ok in allowed - {"dinogen"})
        } - {"dinogen"}
    assert wrong == set()


@pytest.mark.parametrize("path", under("dinogen/report"), ids=name_of)
def test_the_report_reads_files_only(path):
    foreign = {name.partition(".")[0] for name in imports(path)}
    assert foreign & (HEAVY | {"shards"}) == set()


@pytest.mark.parametrize("path", under("launch"), ids=name_of)
def test_help_waits_for_nothing_heavy(path):
    if path.parent.name != "cli":
        return  # imported by the commands when they run
    at_start = [
        node
        for node in tree(path).body
        if isinstance(node, (ast.Import, ast.ImportFrom))  # not those below TYPE_CHECKING
    ]
    found = {name.partition(".")[0] for name in imports(path, at_start)}
    assert found & STARTUP == set()


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_only_dist_reads_where_this_process_stands(path):
    if module(path) == "dinogen.distributed.process_group":
        return
    words = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    strings = {
        node.value
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    assert {text for text in strings if text in words or text.startswith("SLURM_")} == set()


@pytest.mark.parametrize("path", under("dinogen/training", "launch"), ids=name_of)
def test_trainer_and_launcher_name_no_family(path):
    folder = ROOT / "dinogen" / "families"
    shared = {"__init__", "abilities", "base", "denoiser", "gan", "latent", "registry"}
    families = {file.stem for file in folder.glob("*.py")} - shared
    assert families
    strings = {
        node.value
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    assert strings & families == set()
    modules = {f"dinogen.families.{family}" for family in families}
    assert imports(path) & modules == set()


@pytest.mark.parametrize("path", under("dinogen", "launch"), ids=name_of)
def test_only_runs_knows_the_folder_of_a_run(path):
    if not inside(module(path), "dinogen.runs"):
        found = {(module(path), name) for name in spelled_out(tree(path))}
        assert found - NOT_OF_A_RUN == set()


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_each_file_states_its_job_in_its_first_line(path):
    text = ast.get_docstring(tree(path))
    assert text, "no docstring"
    assert 10 <= len(text.splitlines()[0]) <= 100


def test_imports_make_no_circle():
    """Lazy ones and those for types alone count too."""
    waiting = {module(path): ours(path) & MODULES - {module(path)} for path in FILES}
    while free := {name for name, wanted in waiting.items() if not wanted & waiting.keys()}:
        waiting = {name: wanted for name, wanted in waiting.items() if name not in free}
    assert {name: wanted & waiting.keys() for name, wanted in waiting.items()} == {}


def test_a_folder_where_there_would_be_a_prefix():
    for folder in sorted({path.parent for path in FILES}):
        names = [path.stem for path in folder.glob("*.py") if path.stem != "__init__"]
        assert len(names) <= MAX_MODULES, folder
        prefixes = Counter(name.partition("_")[0] for name in names if "_" in name.strip("_"))
        assert [prefix for prefix, count in prefixes.items() if prefix and count > 2] == [], folder


def test_what_is_short_and_needed_once_is_part_of_what_needs_it():
    users = Counter(name for path in FILES for name in ours(path) - {module(path)})
    short = {
        module(path)
        for path in FILES
        if path.name != "__init__.py"
        and users[module(path)] == 1
        and len(path.read_text(encoding="utf-8").splitlines()) < 40
    }
    assert short == set()


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_files_stay_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_LINES


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_nothing_is_unpickled(path):
    assert {name.partition(".")[0] for name in imports(path)} & {
        "pickle",
        "dill",
        "cloudpickle",
        "joblib",
        "marshal",
        "shelve",
    } == set()
    for node in ast.walk(tree(path)):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        called = ast.unparse(node.func)
        given = {word.arg: ast.unparse(word.value) for word in node.keywords}
        if called == "torch.load":
            assert given.get("weights_only") == "True", f"line {node.lineno}: torch.load"
        if called in ("np.load", "numpy.load"):
            assert given.get("allow_pickle") == "False", f"line {node.lineno}: {called}"


@pytest.mark.parametrize("pattern", sorted({*QUICK, *SLOW, *FIRST}))
def test_each_pattern_of_conftest_matches_a_test_file(pattern):
    assert any(path.name.startswith("test_") for path in (ROOT / "tests").glob(pattern)), pattern
