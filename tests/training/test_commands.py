"""`dinogen train` and `dinogen sample` as they are typed."""

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from dinogen.config import dump_config
from launch.cli import main


@pytest.fixture
def dinogen(monkeypatch, capsys):
    """Runs the command line in this process; gives exit code, stdout and stderr."""

    def call(*args):
        monkeypatch.setattr(sys, "argv", ["dinogen", *map(str, args)])
        with pytest.raises(SystemExit) as end:
            main.main()
        return end.value.code or 0, *capsys.readouterr()

    return call


def test_train_then_sample(make_config, tmp_path, dinogen):
    config = make_config("stages.0.kimg=0.04", "stages=[{resolution: 4, kimg: 0.04, batch: 8}]")
    path = tmp_path / "my.yaml"
    path.write_text(dump_config(config))
    command = [sys.executable, "-m", "launch.cli", "train", str(path), "seed=5"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    assert "RANDOM GUIDE" in done.stderr
    assert "final_4x4.random-guide.png" in done.stdout
    assert "tensorboard --logdir" in done.stdout

    for folder in ("a", "b"):
        code, _, err = dinogen(
            "sample", config.run, "--num", 3, "--seed", 2, "--out", tmp_path / folder
        )
        assert code == 0, err
    images = sorted((tmp_path / "a").glob("0*.png"))
    assert len(images) == 3
    for image in images:
        assert image.read_bytes() == (tmp_path / "b" / image.name).read_bytes()
        assert np.asarray(Image.open(image)).shape == (4, 4, 3)
    assert (tmp_path / "a" / "grid_4x4.random-guide.png").exists()


def test_wrong_input_is_one_line_without_a_traceback(make_config, tmp_path, dinogen):
    path = tmp_path / "my.yaml"
    path.write_text(dump_config(make_config()))
    cases = [
        (("train", tmp_path / "none.yaml"), "no such config file"),
        (("train", path, "data.path=/nowhere"), "/nowhere"),
        (("train", path, "guide.path=/nowhere"), "guide.path"),
        (("train", path, "stages.0.bach=3"), "did you mean 'batch'"),
        (("train", path, "--stage", "5"), "stage 5 is not in the config"),
        (("sample", tmp_path), "no run here"),
    ]
    for args, message in cases:
        code, _, err = dinogen(*args)
        assert code == 2, (args, err)
        assert message in err and "Traceback" not in err, (args, err)
