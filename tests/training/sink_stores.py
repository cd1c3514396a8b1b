"""Where W&B, MLflow and Trackio keep the runs of a test module, and a run that is killed there."""

from __future__ import annotations

import os

import pytest

from tests.training.helpers import train_and_die


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("sinks")


def set_variables(place):
    """Where the libraries keep what they are given, as their own variables say."""
    os.environ |= {
        "WANDB_MODE": "offline",
        "WANDB_X_DISABLE_STATS": "true",
        "MLFLOW_TRACKING_URI": str(place / "mlruns"),
        "MLFLOW_ALLOW_FILE_STORE": "true",
        "TRACKIO_DIR": str(place / "trackio"),
    }


@pytest.fixture
def stores(place, monkeypatch):
    monkeypatch.setattr(os, "environ", os.environ.copy())
    set_variables(place)


def die_after(place, dumped, nimg):
    """Train until a checkpoint of ``nimg`` images is there, and be killed."""
    set_variables(place)
    train_and_die(dumped, nimg, 0.0)
