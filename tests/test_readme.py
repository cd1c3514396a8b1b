"""Every command of README and docs/prepare.md, in their order: small photos, a tiny guide."""

import io
import re
import shlex
import subprocess
import sys
import threading
import time
import urllib.request
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import skimage
import yaml
from PIL import Image, ImageEnhance
from typer.testing import CliRunner

from launch.cli.main import app
from tests.forked import torchrun

ROOT = Path(__file__).parents[1]


def blocks(page: str) -> list[tuple[str, str]]:
    """(language, text) of a page's code blocks."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(r"^```(\w+)\n(.*?)^```", text, re.M | re.S)


BLOCKS = blocks("README.md") + blocks("docs/prepare.md")
COMMANDS = [line for kind, block in BLOCKS if kind == "bash" for line in block.splitlines()]
OF_CI = [line for line in COMMANDS if line.startswith("make ")]
# What would take hours, made short; each has to stand in the README as it is written here.
SHORTER = {"stages.0.kimg=2": "stages.0.kimg=0.024"}
# The same for a whole config of docs/prepare.md: what is added to the command.
ADDED = {"vae_latent_fast": ["stages.0.kimg=0.032"]}


def photo(number: int) -> Image.Image:
    """The astronaut, a little different each time."""
    image = Image.open(Path(skimage.data_dir) / "astronaut.png").convert("RGB")
    image = image.crop((60, 0, 380, 320))
    return ImageEnhance.Brightness(image).enhance(0.7 + 0.1 * number)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with what the README's user has: photos, downloaded sets, a list, my.yaml."""
    folder = tmp_path_factory.mktemp("readme")
    for name in ("photos", "ffhq/images1024x1024", "CelebAMask-HQ/CelebA-HQ-img"):
        (folder / name).mkdir(parents=True)
        for number in range(5):
            photo(number).save(folder / name / f"{number:05d}.jpg", quality=90)
    (text,) = [block for kind, block in BLOCKS if kind == "yaml"]
    config = yaml.safe_load(text)
    config["prepare"]["pack"]["val_fraction"] = 0.4  # one of the five photos
    config["family"] |= {"z_dim": 8, "channel_base": 64, "channel_max": 8, "probe_samples": 4}
    config["metrics"] = {"num_samples": 16}
    for stage in config["stages"]:
        stage |= {"kimg": 0.016, "batch": 4} | (
            {"fade_kimg": 0.008} if "fade_kimg" in stage else {}
        )
    (folder / "my.yaml").write_text(yaml.safe_dump(config))
    return folder


@pytest.fixture(scope="module")
def urls(workplace):
    """urls.txt, of a server that has the photos."""
    handler = partial(SimpleHTTPRequestHandler, directory=str(workplace / "photos"))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    lines = [f"http://127.0.0.1:{server.server_port}/{n:05d}.jpg\n" for n in range(5)]
    (workplace / "urls.txt").write_text("".join(lines))
    yield
    server.shutdown()


def run_tensorboard(command: list[str], folder: Path) -> None:
    """Start it on a free port, ask for its runs, stop it."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tensorboard.main", *command[1:], "--port", "0"],
        cwd=folder,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stderr is not None
        for line in process.stderr:
            if found := re.search(r"http://localhost:(\d+)/", line):
                break
        address = f"http://localhost:{found[1]}/data/runs"
        runs, until = b"", time.monotonic() + 240
        while b"32x32" not in runs and time.monotonic() < until:
            with urllib.request.urlopen(address) as answer:
                runs = answer.read()
            time.sleep(0.2)
        assert all(name in runs for name in (b"4x4/tb", b"8x8/tb", b"16x16/tb", b"32x32/tb"))
    finally:
        process.terminate()
        process.wait()


def run_serve(command: list[str], folder: Path) -> None:
    """Start it on a free port, ask for its page, stop it."""
    process = subprocess.Popen(
        [sys.executable, "-m", "launch.cli", *command[1:], "--port", "0"],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        assert process.stdout is not None
        said = ""
        for line in process.stdout:
            said += line
            if found := re.search(r"http://127\.0\.0\.1:\d+", line):
                break
        assert found, said
        with urllib.request.urlopen(found[0]) as answer:
            assert b"guided" in answer.read()
    finally:
        process.terminate()
        process.wait()


def run(line: str, folder: Path) -> None:
    command = [SHORTER.get(word, word) for word in shlex.split(line)]
    if command[:2] == ["dinogen", "train"]:
        command += ADDED.get(command[2], [])
    if command[0] == "tensorboard":
        run_tensorboard(command, folder)
    elif command[:2] == ["dinogen", "serve"]:
        run_serve(command, folder)
    elif command[:3] == ["python", "-m", "launch.local.torchrun"]:
        assert command[3:6] == ["--standalone", "--nproc-per-node", "2"], line
        done = torchrun(2, *command[6:])
        assert done.returncode == 0, f"{line}\n{done.stderr}"
    elif command[:2] == ["dinogen", "launch"]:
        # it gives its place to torchrun: not the process of the tests
        program = [sys.executable, "-m", "launch.cli", *command[1:]]
        done = subprocess.run(program, cwd=folder, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{line}\n{done.stderr}"
    else:
        assert command[0] == "dinogen", line
        result = CliRunner().invoke(app, command[1:])
        assert result.exit_code == 0, f"{line}\n{result.output}\n{result.exception}"


def test_all_its_commands_run_in_their_order(workplace, urls, monkeypatch):
    monkeypatch.chdir(workplace)
    lines = [line for line in COMMANDS if line not in OF_CI and not line.startswith("source ")]
    assert len(lines) > 15
    for line in lines:
        run(line, workplace)
    assert (workplace / "runs/first/index.html").is_file()
    assert len(list((workplace / "runs/first/samples").rglob("0*.png"))) == 64
    for name in ("faces", "steps", "ffhq", "celebahq", "downloaded", "again", "latents"):
        assert (workplace / "data" / name / "manifest.json").is_file(), name
    # What train and sample made of the run with the changed keys is that of the change.
    assert "kimg: 0.024" in (workplace / "runs/second/config.yaml").read_text()
    (exported,) = [block for kind, block in BLOCKS if kind == "python"]
    code = next(block for kind, block in blocks("docs/data-format.md") if kind == "python")
    shown = io.StringIO()
    monkeypatch.setattr("sys.stdout", shown)
    exec(compile(exported, "README.md", "exec"), {})
    assert "torch.Size([4, 3, 32, 32]) 64" in shown.getvalue()
    exec(compile(code.replace("batch_size=8", "batch_size=2"), "data-format.md", "exec"), {})
    assert "torch.Size([2, 3, 64, 64]) torch.Size([2, 256, 352])" in shown.getvalue()
    assert "{'position': 2}" in shown.getvalue()


@pytest.mark.parametrize("line", OF_CI)
def test_what_make_runs_is_run_by_ci(line):
    assert line in (ROOT / ".ci" / "run").read_text()


def test_what_it_shortens_and_links_is_there():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert all(word in text for word in SHORTER)
    links = re.findall(r"\]\(([^)#:]+)\)", text)
    assert links
    assert len(text.splitlines()) <= 200
    assert [link for link in links if not (ROOT / link).exists()] == []
