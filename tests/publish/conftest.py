"""A run of two tiny stages, trained once, and an evaluation of its end."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from dinogen.config import parse_config
from dinogen.training.run import train
from tests.training.conftest import data_folder as data_folder
from tests.training.conftest import guide_folder as guide_folder


@pytest.fixture(scope="session")
def trained(tmp_path_factory, data_folder, guide_folder) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("trained") / "run"
    train(
        parse_config(
            {
                "run": str(folder),
                "data": {"path": str(data_folder), "num_threads": 0},
                "guide": {"path": str(guide_folder)},
                "family": {
                    "name": "guided",
                    "z_dim": 8,
                    "channel_base": 64,
                    "channel_max": 16,
                    "probe_samples": 8,
                    "objectives": [{"name": "mse"}],
                },
                "stages": [
                    {"resolution": 4, "kimg": 0.016, "batch": 8},
                    {"resolution": 8, "kimg": 0.016, "batch": 8},
                ],
                "log": {"num_samples": 4},
                "cluster": {"account": "account-of-the-lab"},
            }
        )
    )
    return folder


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """A copy, for results are written into it."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.fixture
def evaluation(run) -> Path:
    """evaluation.json as `dinogen evaluate` writes it: one value of sense, one without, none."""

    def value(name: str, number: float | None, **more: object) -> dict[str, object]:
        reason = "no weights in /home/me/weights" if number is None else None
        command = f"dinogen evaluate {run} metrics.inception=/home/me/a.pth https://x.org/y"
        found = {"name": name, "value": number, "spread": None, "better": "lower", "reason": reason}
        found |= {"num_samples": 60, "num_reference": 50, "command": command, "caution": None}
        return found | {"fingerprint": None} | more

    nimg = json.loads((run / "8x8" / "result.json").read_text())["nimg"]
    measured = {
        "spectrum": value("spectrum", 4.5, spread=0.2, fingerprint="a" * 12, caution="few"),
        "fid": value(
            *("fid", 12.5),
            fingerprint="b" * 12,
            command=f"dinogen evaluate {run} 'data.path=/home/Doe, Jane/my faces'",
        ),
        "kid": value("kid", None),
    }
    found = {
        "stage": 8,
        "resolution": 8,
        "nimg": nimg,
        "measured": measured,
        "fingerprints": {"a" * 12: {"split": "val"}, "b" * 12: {"split": "val", "random": True}},
    }
    path = run / "8x8" / "evaluation.json"
    path.write_text(json.dumps(found))
    return path
