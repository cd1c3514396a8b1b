"""``dinogen faces`` and ``dinogen download`` as they are typed."""

import http.server
import json
import threading
from functools import partial

import numpy as np
import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from dinogen.config import ConfigError
from dinogen.prepare.photos.read import PrepareError
from launch.cli import prepare


@pytest.fixture
def dinogen():
    app = typer.Typer(rich_markup_mode="rich")
    prepare.register(app)
    runner = CliRunner()
    return lambda *arguments: runner.invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def photos(tmp_path):
    src = tmp_path / "photos"
    src.mkdir()
    for number in range(3):
        Image.fromarray(np.full((50, 60, 3), 80 * number, np.uint8)).save(src / f"{number}.png")
    (src / "bad.jpg").write_text("not a photo")
    return src


def test_help_teaches_by_example(dinogen):
    result = dinogen("faces", "--help")
    assert result.exit_code == 0
    assert "prepare.faces.align=ffhq" in result.output
    assert "dinogen download urls.txt photos" in dinogen("download", "--help").output


def test_faces_with_config_and_overrides(dinogen, photos, tmp_path):
    config = tmp_path / "my.yaml"
    config.write_text("prepare: {faces: {detect: none, size: 64}}\n")
    out = tmp_path / "faces"
    result = dinogen("faces", photos, out, "-c", config, "prepare.faces.size=32")
    assert result.exit_code == 0, result.output
    assert len(list(out.glob("*.jpg"))) == 3
    with Image.open(next(out.glob("*.jpg"))) as image:
        assert image.size == (32, 32)
    assert "rejected: not_an_image" in result.output
    assert str(out / "rejected.csv") in result.output
    again = dinogen("faces", photos, out, "-c", config, "prepare.faces.size=32")
    assert again.exit_code == 0
    assert json.loads((out / "summary.json").read_text())["num_skipped"] == 3


def test_no_face_at_all_is_told_loudly(dinogen, photos, tmp_path):
    result = dinogen("faces", photos, tmp_path / "faces", "--device", "cpu")
    assert result.exit_code == 1
    assert "NO FACE WAS FOUND" in result.output
    assert "prepare.faces.detect=none" in result.output
    # and the advice can be followed
    advised = dinogen("faces", photos, tmp_path / "faces", "prepare.faces.detect=none")
    assert advised.exit_code == 0
    assert len(list((tmp_path / "faces").glob("*.jpg"))) == 3


@pytest.mark.parametrize(
    ("arguments", "error", "part"),
    [
        (["prepare.faces.alignn=ffhq"], ConfigError, "did you mean 'align'"),
        (["prepare.faces.align=round"], ConfigError, "prepare.faces.align"),
        (["--device", "teapot"], PrepareError, "teapot"),
    ],
)
def test_wrong_options(dinogen, photos, tmp_path, arguments, error, part):
    result = dinogen("faces", photos, tmp_path / "faces", *arguments)
    assert isinstance(result.exception, error)
    assert part in str(result.exception)


def test_download(dinogen, photos, tmp_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=photos))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        root = f"http://127.0.0.1:{server.server_port}"
        listing = tmp_path / "list.txt"
        listing.write_text(f"{root}/0.png\n{root}/absent.png\n")
        result = dinogen("download", listing, tmp_path / "out")
        assert result.exit_code == 1
        assert "http_404" in result.output
        assert "1 fetched" in result.output
        assert (tmp_path / "out" / "failed.csv").exists()
        listing.write_text(f"{root}/0.png\n{root}/1.png\n")
        assert dinogen("download", listing, tmp_path / "out").exit_code == 0
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert (tmp_path / "out" / "1.png").read_bytes() == (photos / "1.png").read_bytes()
