"""What docs/unets.md shows, run as it stands there, and wrong inputs as they are typed."""

import re
import shlex
import sys
from pathlib import Path

import pytest
import torch

from dinogen._torchvision import ensure_torchvision
from dinogen.runs.run import Run
from launch.cli import main
from tests.formats.test_guided_diffusion import Made
from tests.formats.unet_runs import disturbed

ensure_torchvision()
from diffusers import DDIMPipeline, DDPMPipeline, DDPMScheduler, UNet2DModel  # noqa: E402

TEXT = (Path(__file__).parents[2] / "docs" / "unets.md").read_text(encoding="utf-8")
BLOCKS = dict(re.findall(r"^```(python)\n(.*?)^```", TEXT, re.M | re.S))
COMMANDS = "".join(re.findall(r"^```bash\n(.*?)^```", TEXT, re.M | re.S)).splitlines()


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The folder in which the page begins."""
    monkeypatch.chdir(tmp_path)
    torch.save(Made(head_channels=16, scale=True, by_block=True, out=6).state, "cats.pt")
    model = disturbed(UNet2DModel(16, block_out_channels=(32,), down_block_types=["DownBlock2D"],
                                  up_block_types=["UpBlock2D"], layers_per_block=1))  # fmt: skip
    DDPMPipeline(model, DDPMScheduler()).save_pretrained("ddpm-cats")
    return tmp_path


@pytest.fixture
def dinogen(monkeypatch, capsys):
    """Runs the command line in this process; gives exit code, stdout and stderr."""

    def call(*args):
        monkeypatch.setattr(sys, "argv", ["dinogen", *args])
        with pytest.raises(SystemExit) as end:
            main.main()
        return end.value.code or 0, *capsys.readouterr()

    return call


def test_every_command_and_snippet(place, dinogen):
    said = ""
    for line in COMMANDS:
        code, out, err = dinogen(*shlex.split(line)[1:])
        assert code == 0, err
        said += out + err
    assert "DROPPED" in said and "init_from=runs/ddpm-cats" in said
    assert len(list(Path("runs/cats/samples").rglob("0*.png"))) == 4
    for run in ("runs/cats", "runs/ddpm-cats"):
        assert Run(Path(run)).config.family.name == "ddpm"
    own = {"DDIMPipeline": DDIMPipeline}
    exec(BLOCKS["python"].replace("num_inference_steps=100", "num_inference_steps=2"), own)
    assert own["images"].shape == (4, 16, 16, 3)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("import guided-diffusion cats.pt out --image-size 16", "--head-channels"),
        (
            "import guided-diffusion cats.pt out --image-size 16 --num-heads 4 --schedule cosin",
            "--schedule 'cosin': give linear or cosine",
        ),
        (
            "import guided-diffusion cats.pt out --image-size 16 --num-heads 4 --prediction v",
            "--prediction 'v': give epsilon or x0",
        ),
        ("import guided-diffusion ddpm-cats out --image-size 16 --num-heads 4", "no such file"),
        ("import guided-diffusion cats.pt ddpm-cats --image-size 16 --num-heads 4", "exists"),
        ("import diffusers cats.pt out", "is no folder"),
        ("import diffusers . out", "config.json: there is no such file"),
        ("import diffusers ddpm-cats out --image-size 32", "--image-size 32 is another"),
        ("import diffusers ddpm-cats out --schedule cosine", "leave out --schedule"),
    ],
)
def test_a_wrong_line_is_one_clear_error(place, dinogen, line, message):
    code, _, err = dinogen(*shlex.split(line))
    assert code == 2 and message in err
    assert err.count("dinogen: ") == 1 and "Traceback" not in err
    assert not Path("out").exists()


@pytest.mark.parametrize("option", ["image-size", "num-heads", "head-channels", "num-steps"])
@pytest.mark.parametrize("number", ["0", "-4"])
def test_numbers_are_above_zero(place, dinogen, option, number):
    line = f"import guided-diffusion cats.pt out --image-size 16 --{option} {number}"
    code, _, err = dinogen(*shlex.split(line))
    assert code == 2 and f"--{option}" in err and "Traceback" not in err
    assert not Path("out").exists()
