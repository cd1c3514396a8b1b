"""Container files and the workflow of the pages: linted, and compared with the Makefile."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
DEFINITION = (ROOT / "apptainer.def").read_text(encoding="utf-8")
SECTIONS = {"arguments", "files", "post", "environment", "runscript", "test", "labels", "help"}


def tool(name: str) -> str:
    """A linter beside this interpreter, or on the PATH."""
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.is_file() else shutil.which(name)
    assert found, f"{name} is missing: make install"
    return found


def instructions() -> list[tuple[str, str]]:
    """(instruction, rest) of the Dockerfile, without comments, continued lines joined."""
    lines = [line for line in DOCKERFILE.splitlines() if not line.startswith("#")]
    text = "\n".join(lines).replace("\\\n", " ")
    pairs = [line.split(None, 1) for line in text.splitlines() if line.strip()]
    return [(name, " ".join(rest.split())) for name, rest in pairs]


def header() -> dict[str, str]:
    """``Bootstrap`` and ``From`` of the definition."""
    top = DEFINITION[: DEFINITION.index("%")]
    pairs = [line.partition(":") for line in top.splitlines() if line and not line.startswith("#")]
    return {name: value.strip() for name, _, value in pairs}


def sections() -> dict[str, str]:
    """The sections of the definition by name, each once."""
    _, *parts = re.split(r"^%(\w+)[^\n]*\n", DEFINITION, flags=re.M)
    names, texts = parts[::2], parts[1::2]
    assert len(set(names)) == len(names)
    return dict(zip(names, texts, strict=True))


def of_kind(kind: str) -> list[str]:
    return [rest for name, rest in instructions() if name == kind]


def apt_packages(text: str) -> set[str]:
    (found,) = re.findall(r"apt-get install ([^&\n]*)", text)
    return {word for word in found.split() if not word.startswith("-")}


def kept_by_git() -> set[str]:
    """The top level of the repository."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    return {Path(name).parts[0] for name in listed}


def test_hadolint_finds_nothing():
    done = subprocess.run(
        [tool("hadolint"), "--failure-threshold", "style", ROOT / "Dockerfile"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_definition_has_known_sections_and_the_same_base():
    assert set(sections()) == SECTIONS
    assert header() == {"Bootstrap": "docker", "From": of_kind("FROM")[0]}
    (base,) = of_kind("FROM")
    version = re.fullmatch(r"python:(3\.\d+)-slim-bookworm", base)
    assert version, "a release of Python and of its base, and no host"
    supported = re.findall(r"Python :: (3\.\d+)", (ROOT / "setup.cfg").read_text())
    assert version[1] in supported


@pytest.mark.parametrize("name", ["post", "environment", "runscript", "test"])
def test_shellcheck_finds_nothing_in_the_definition(name):
    script = sections()[name].replace("{{ TORCH_INDEX }}", "$TORCH_INDEX")
    declared = "TORCH_INDEX=default\n" if name == "post" else ""
    done = subprocess.run(
        [tool("shellcheck"), "--shell=sh", "-"],
        input=declared + script,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout


def test_both_install_what_the_makefile_installs():
    """By its own command, so no second list of packages can differ from it."""
    commands = {"docker": " ".join(of_kind("RUN")), "apptainer": sections()["post"]}
    for text in commands.values():
        assert len(re.findall(r"\bmake install\b", text)) == 1
        assert not re.search(r"\bpip3? install\b|\bcurl\b|\bwget\b", text)
        assert "git init --quiet" in text
    assert apt_packages(commands["docker"]) == apt_packages(commands["apptainer"])
    assert {"make", "git"} <= apt_packages(commands["docker"])
    recipe = subprocess.run(
        ["make", "--dry-run", "--always-make", "install", f"PYTHON={sys.executable}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "-c constraints.txt -e" in recipe
    assert of_kind("ARG") == ["TORCH_INDEX="] and "TORCH_INDEX=" in sections()["arguments"]
    for text in commands.values():
        assert "PIP_EXTRA_INDEX_URL=" in text


@pytest.mark.parametrize(("given", "index"), [(None, ""), ("file:///wheels", "file:///wheels")])
def test_an_index_that_is_not_given_is_none(given, index):
    """Some versions of Apptainer skip an argument whose value is empty."""
    arguments = dict(line.strip().split("=") for line in sections()["arguments"].split())
    assert list(arguments) == ["TORCH_INDEX"] and all(arguments.values())
    script = sections()["post"]
    script = script[script.index("    index=") : script.index("    git config")]
    script = script.replace("{{ TORCH_INDEX }}", given or arguments["TORCH_INDEX"])
    make = 'set -eu; make() { echo "$1 from <$PIP_EXTRA_INDEX_URL>"; }\n'
    done = subprocess.run(["sh", "-c", make + script], capture_output=True, text=True, check=True)
    assert done.stdout == f"install from <{index}>\n"


def test_the_user_owns_the_folders_above_a_cache_of_the_build():
    """Docker makes folders that are missing above a mount, and root owns them."""
    targets = re.findall(r"--mount=type=cache,target=(/home/\S+?),", " ".join(of_kind("RUN")))
    (made,) = re.findall(r"install --directory --owner=dinogen (.*?) &&", of_kind("RUN")[0])
    for target in map(Path, targets):
        below_home = [one for one in (target, *target.parents) if len(one.parts) > 3]
        assert {str(one) for one in below_home} <= set(made.split())
    assert targets


def test_what_the_installation_reads_is_there_before_it():
    before, found = [], False
    for name, rest in instructions():
        found = found or "make install" in rest
        if name == "COPY" and not found:
            before += shlex.split(rest)[1:-1]
    needed = re.findall(r"^\$\(STAMP\): (.*)$", (ROOT / "Makefile").read_text(), re.M)[0].split()
    assert {"Makefile", "dinogen/version.py", *needed} <= set(before)
    assert all((ROOT / name).is_file() for name in before)


def test_what_is_copied_is_what_git_keeps():
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in ignored[:2]
    assert {line[1:] for line in ignored if line.startswith("!")} == kept_by_git()
    pairs = [line.split() for line in sections()["files"].splitlines() if line.strip()]
    assert {source for source, _ in pairs} == kept_by_git()
    assert all(target == f"/opt/dinogen/{source}" for source, target in pairs)


def test_it_runs_as_a_user_and_holds_no_secret():
    assert of_kind("USER") == ["1000:1000"]
    names = [name for name, _ in instructions()]
    assert names.index("USER") < names.index("COPY") and "ADD" not in names
    for text in (DOCKERFILE, DEFINITION):
        assert not re.search(r"(?i)token|password|secret|api_?key|https?://", text)


def test_the_commands_of_the_readme_work_from_what_is_copied(tmp_path):
    """With the stamp of the installation there, make installs nothing again and writes nothing."""
    for name in ("Makefile", "setup.cfg", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / ".installed").touch()
    readme = (ROOT / "README.md").read_text()
    commands = re.search(r"^```bash\n(make demo)\n(make test)\n```", readme, re.M)
    assert commands
    for command, does in zip(commands.groups(), ("dinogen demo", "pytest"), strict=True):
        words = [*command.split(), "--dry-run"]
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=True)
        assert does in done.stdout and "pip" not in done.stdout
        assert f"make -C /opt/dinogen {command.split()[1]}" in DOCKERFILE
        assert f"make -C /opt/dinogen {command.split()[1]}" in sections()["help"]


def test_the_page_names_what_is_in_the_image():
    page = (ROOT / "docs" / "cluster.md").read_text()
    (block,) = re.findall(r"^```shell\n(.*?)^```", page, re.M | re.S)
    built, *used = [shlex.split(line) for line in block.splitlines()]
    assert built[:2] == ["apptainer", "build"] and (ROOT / built[-1]).is_file()
    programs = [words[words.index(built[2]) + 1] for words in used]
    assert programs == ["dinogen", "make"]  # of the image's PATH, and of its packages
    python = re.search(r"DINOGEN_PYTHON=(\S+)/python", page)
    assert python and f'PATH="{python[1]}:' in sections()["environment"]
    assert f"PATH={python[1]}:" in " ".join(of_kind("ENV"))
    assert "--build-arg TORCH_INDEX=URL" in page


def test_the_pages_are_built_as_the_makefile_builds_them():
    text = (ROOT / ".github" / "workflows" / "pages.yml").read_text()
    workflow = yaml.safe_load(text)
    triggers = workflow[True]  # YAML reads `on` as a switch
    assert triggers["push"] == {"branches": ["main"]} and "pull_request" not in triggers
    assert workflow["permissions"] == {"contents": "read"}
    build, deploy = workflow["jobs"]["build"], workflow["jobs"]["deploy"]
    assert [step["run"] for step in build["steps"] if "run" in step] == ["make docs"]
    assert "permissions" not in build
    assert deploy["permissions"] == {"pages": "write", "id-token": "write"}
    assert deploy["needs"] == "build"
    used = [step["uses"] for job in (build, deploy) for step in job["steps"] if "uses" in step]
    assert all(re.fullmatch(r"actions/[a-z-]+@[0-9a-f]{40}", one) for one in used)
    assert len(re.findall(r"@[0-9a-f]{40}  # v\d+\.\d+\.\d+$", text, re.M)) == len(used)
    (upload,) = (step for step in build["steps"] if "upload-pages" in step.get("uses", ""))
    site = re.search(r"^site_dir: (.*)$", (ROOT / "mkdocs.yml").read_text(), re.M)
    assert site and upload["with"] == {"path": site[1]}
    recipe = subprocess.run(
        ["make", "--dry-run", "docs", f"PYTHON={sys.executable}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "mkdocs build --strict" in recipe
