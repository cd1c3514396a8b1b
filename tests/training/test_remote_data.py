"""Training from an S3 server of which every tenth request fails: the weights of local training."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time

import pytest
import torch

from dinogen.training.engines.base import split
from dinogen.training.run import train
from shards import FetchError
from tests.servers import s3_environment, s3_server
from tests.training.helpers import curve, torchrun, weights


@pytest.fixture
def s3(data_folder, monkeypatch):
    with s3_server(data_folder) as server:
        for name, value in s3_environment(server.url).items():
            monkeypatch.setenv(name, value)
        yield server


def remote(tmp_path, name, *more):
    return ["data.path=s3://faces/data", f"data.cache_dir={tmp_path / name}", *more]


def assert_same(a, b):
    for resolution in (4, 8):
        left, right = weights(a, resolution), weights(b, resolution)
        assert left.keys() == right.keys()
        assert [name for name in left if not torch.equal(left[name], right[name])] == []
        assert curve(a, resolution) == curve(b, resolution)


def test_the_weights_are_those_of_local_training(make_config, s3, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr("shards.remote.download.FIRST_WAIT_S", 0.01)
    keys: list[list[str]] = []

    def keep(batch, *args):
        keys[-1].extend(batch["key"])
        return split(batch, *args)

    monkeypatch.setattr("dinogen.training.trainer.split", keep)
    local = make_config(run="local")
    keys.append([])
    train(local)
    num_faults = 0
    # The second cache holds no two of the three shards.
    for seed, more in enumerate(([], ["data.cache_gb=0.0001", "data.on_error=skip"])):
        s3.seldom(0.3, seed)
        config = make_config(
            *remote(tmp_path, f"cache{seed}", "data.num_threads=1", *more), run=f"remote{seed}"
        )
        keys.append([])
        train(config)
        assert keys[-1] == keys[0]
        assert_same(config, local)
        num_faults += len(s3.faults)
        s3.faults.clear()
    assert num_faults > 0
    assert "trying again in" in caplog.text
    assert "data.cache_gb=0.0001 IS TOO SMALL" in caplog.text


def test_a_run_goes_on_from_another_place(make_config, s3, tmp_path, monkeypatch):
    """Begun on local disk, ended from S3: where the data lie is no part of the run."""
    whole = make_config(run="whole")
    train(whole)
    train(make_config(run="moved"), 4)
    moved = make_config(*remote(tmp_path, "cache"), run="moved")
    train(moved)
    assert_same(moved, whole)


def test_a_run_that_waits_for_a_shard_can_be_stopped(make_config, s3, tmp_path, monkeypatch):
    """Here before its first step, while its family looks at the data: test_stop.py has the rest."""
    monkeypatch.setattr("shards.remote.download.FIRST_WAIT_S", 60.0)
    monkeypatch.setattr("shards.remote.download.HURRY_S", 1.0)
    config = make_config(*remote(tmp_path, "cache"))
    s3.always("tar", 503)

    def stop_it() -> None:
        while not any(name.endswith("tar") for name in s3.requests):
            time.sleep(0.05)
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop_it).start()
    said = r"tar: .*Service Unavailable.*asked to stop.*run the same command again"
    with pytest.raises(FetchError, match=said):
        train(config)


def test_ranks_fetch_each_file_once(make_config, s3, tmp_path):
    short = ["stages.0.kimg=0.016", "stages.1.kimg=0.016", "stages.1.fade_kimg=0.008"]
    config = make_config(*remote(tmp_path, "cache", *short))
    torchrun(config, 2)
    fetched = [name for name in s3.requests if name != "manifest.json"]
    assert len(fetched) == len(set(fetched)) >= 6
