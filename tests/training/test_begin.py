"""What a run says as it begins: family, stages, device, guide, parameters, data, and short GANs."""

from __future__ import annotations

import logging

import pytest

from dinogen.config import with_lengths
from dinogen.training.data import open_data
from dinogen.training.logging.begin import say_what_begins
from dinogen.training.preflight import check_run
from dinogen.training.run import train
from tests.families.tiny import pack_discs, tiny_config


@pytest.fixture(scope="module")
def discs_on_disk(tmp_path_factory):
    folder = tmp_path_factory.mktemp("begin") / "data"
    pack_discs(folder)
    return folder


def test_it_says_in_a_few_lines_what_is_trained(make_config, caplog):
    config = make_config("stages.0.kimg=0.016", "stages.1={resolution: 8, kimg: 0.016, batch: 8}")
    with caplog.at_level(logging.INFO, "dinogen"):
        (result, _) = train(config)
    lines = caplog.text.splitlines()
    (run,) = [line for line in lines if "0.032 kimg in all" in line]
    assert "family guided" in run and "4x4 0.016 kimg, 8x8 0.016 kimg" in run
    (device,) = [line for line in lines if "device cpu" in line]
    assert "1 process)" in device and "fp32" in device
    assert f"guide dinov2 {config.guide.path}" in device
    (data,) = [line for line in lines if "images in split train" in line]
    assert str(config.data.path) in data and "40 images" in data
    # the same number as in the result of the stage
    assert any("parameters at 8x8: G " in line for line in lines)
    assert result["num_parameters"] > 0


@pytest.mark.parametrize(
    ("family", "length", "warns"),
    [
        ("dcgan", "stages.0.epochs=100", True),
        ("dcgan", "stages.0.epochs=60000", False),
        ("dcgan", "stages.0.kimg=1.8", False),
        ("vae", "stages.0.epochs=100", False),
    ],
)
def test_a_gan_of_few_epochs_is_told_how_many_kimg_that_is(
    family, length, warns, discs_on_disk, tmp_path, caplog
):
    config = tiny_config(family, discs_on_disk, tmp_path, "stages.0.kimg=null", length)
    data = open_data(config)
    config = with_lengths(config, data.num_samples("train"))
    families = check_run(config, [0], data)
    with caplog.at_level(logging.WARNING, "dinogen"):
        say_what_begins(config, families, data)
    if not warns:
        assert "kimg" not in caplog.text
        return
    assert "100 epochs of 17 images are only 1.7 kimg" in caplog.text
    assert "set stages.0.kimg=1000 or more" in caplog.text
    assert caplog.text.count("WARNING") == 1
