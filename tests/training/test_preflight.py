"""What is refused before the first step, and what a refused or broken run keeps."""

import io
import json
import shutil
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode

from dinogen.config import ConfigError
from dinogen.networks.progressive import ProgressiveGenerator
from dinogen.report.progress import duration
from dinogen.runs.lock import run_lock
from dinogen.training.checkpointing.checkpoint import (
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
)
from dinogen.training.logging.logger import Logger
from dinogen.training.preflight import check_run
from dinogen.training.run import train
from dinogen.training.trainer import TrainingError
from shards import Sample, open_dataset, pack
from tests.families.tiny import tiny_config

from .helpers import stage


@pytest.fixture
def damaged(data_folder, tmp_path):
    """The shards, with one bit of the last sample's image flipped."""
    folder = tmp_path / "damaged"
    shutil.copytree(data_folder, folder)
    data = open_dataset(folder)
    (tar,) = [s.name for s in data.manifest.shards][-1:]
    content = bytearray((folder / tar).read_bytes())
    last = content.rindex(b"IEND")
    content[last - 40] ^= 1
    (folder / tar).write_bytes(content)
    return folder


def test_images_too_small_for_a_stage_are_known_first(tmp_path, caplog):
    """A tar from elsewhere, in which one image is smaller than the second stage."""
    folder = tmp_path / "tars"
    folder.mkdir()
    with tarfile.open(folder / "a.tar", "w") as tar:
        for number in range(8):
            image, side = io.BytesIO(), 16 if number == 3 else 32
            Image.new("RGB", (side, side), (number * 30, 0, 0)).save(image, "PNG")
            info = tarfile.TarInfo(f"{number}.png")
            info.size = image.tell()
            image.seek(0)
            tar.addfile(info, image)
    stages = [{"resolution": size, "kimg": 1, "batch": 4, "lr": 1e-3} for size in (16, 32)]
    wanted = (folder, tmp_path / "run", f"stages={json.dumps(stages)}")
    config, data = tiny_config("dcgan", *wanted), open_dataset(folder)
    with pytest.raises(ConfigError, match=r"1 of the 8 images .* 32x32 .*\(3 of a.tar is 16x16\)"):
        check_run(config, [0, 1], data)
    assert not (tmp_path / "run").exists()
    check_run(config, [0], data)
    check_run(tiny_config("dcgan", *wanted, "data.on_error=skip"), [0, 1], data)
    assert "they are skipped" in caplog.text


@pytest.mark.parametrize("change", ["seed=5", "family.z_dim=9", "stages.0.lr=0.02"])
def test_a_finished_run_is_not_passed_off_as_another(make_config, change):
    train(make_config(), 4)
    before = (make_config().run / "config.yaml").read_text()
    for resolutions in ((), (4,), (8,)):
        with pytest.raises(ConfigError, match=change.split("=")[0]):
            train(make_config(change), *resolutions)
    assert (make_config().run / "config.yaml").read_text() == before


def test_a_shortened_stage_is_finished_for_the_next_one_too(make_config):
    config = make_config("stages.0.kimg=10")
    shorter = make_config("stages.0.kimg=0.04", "stages.1.kimg=0.08")
    train(shorter, 4)
    # as if it had been stopped there, with the longer plan in its config
    newest = newest_checkpoint(stage(config, 4) / "checkpoints")
    state = newest.state | {"config": config.model_dump(mode="json")}
    (newest.folder / "state.json").write_text(json.dumps(state))
    assert [result["nimg"] for result in train(shorter)] == [40, 120]


def test_every_stage_is_checked_before_the_first_is_trained(make_config, data_folder):
    grown = [
        {"resolution": size, "kimg": 0.008, "batch": 8, "lr": 0.01} for size in (4, 8, 16, 32, 64)
    ]
    config = make_config(f"stages={json.dumps(grown)}")
    with pytest.raises(ConfigError, match=r"stage 64 is larger than the images .*32x32"):
        train(config)
    assert not stage(config, 4).exists()


def test_levels_that_lack_are_named_before_the_first_stage(make_config, tmp_path):
    file = io.BytesIO()
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(file, "PNG")
    levels = {"n4": np.zeros((16, 32), np.float16)}
    samples = [Sample(f"k{n}", file.getvalue(), "png", {}, levels) for n in range(3)]
    pack(samples, tmp_path / "flat", guide={"name": "dinov2"})
    with pytest.raises(ConfigError, match="stage 8 reads the level n8, the shards have n4"):
        train(make_config(f"data.path={tmp_path / 'flat'}"))


def test_the_layer_of_the_guide_has_to_fit_the_shards(make_config):
    with pytest.raises(ConfigError, match="layer 1 instead of 2"):
        train(make_config("guide.layer=1"))


def test_two_trainings_in_one_folder_are_refused(make_config):
    config = make_config()
    with run_lock(config.run), pytest.raises(ConfigError, match="another process trains in"):
        train(config)
    train(config, 4)


@pytest.mark.parametrize("on_error", ["stop", "skip"])
def test_a_damaged_image_that_nothing_learns_from_costs_no_stage(
    make_config, damaged, on_error, caplog
):
    config = make_config(f"data.path={damaged}", f"data.on_error={on_error}")
    (result,) = train(config, 4)
    assert result["status"] == "finished"
    assert "disc039" in caplog.text


def test_a_broken_checkpoint_is_replaced_and_does_not_push_out_whole_ones(make_config):
    config = make_config("checkpoint.keep_last=1")
    train(config, 4)
    broken = stage(config, 4) / "checkpoints" / "000000080"
    whole = load_checkpoint(broken)
    weights = broken / "G.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    (result, _) = train(config)
    assert result["nimg"] == 80
    again = load_checkpoint(broken)
    assert again.state["progress"]["nimg"] == whole.state["progress"]["nimg"]
    assert (broken.parent / ".broken-000000080").is_dir()


def test_what_lies_further_on_is_broken_and_set_aside(tmp_path):
    save_checkpoint(tmp_path, 90, {"G": {"a": torch.ones(1)}}, {})
    save_checkpoint(tmp_path, 50, {"G": {"a": torch.zeros(1)}}, {})
    assert newest_checkpoint(tmp_path).folder.name == "000000050"


def test_weights_that_blew_up_are_not_saved_and_not_called_fine(make_config):
    config = make_config("stages.0.lr=1e36", "checkpoint.every_kimg=0.008")
    with pytest.raises(TrainingError, match=r"not finite .*another folder with a lower lr"):
        train(config, 4)
    for folder in (stage(config, 4) / "checkpoints").iterdir():
        assert load_checkpoint(folder).state["progress"]["nimg"] <= 8 * 3
    assert not (stage(config, 4) / "result.json").exists()


def test_a_lost_page_comes_back(make_config):
    config = make_config()
    train(config, 4)
    (config.run / "index.html").unlink()
    train(config, 4)
    assert (config.run / "index.html").is_file()


def test_sums_lie_on_one_device_wherever_values_come_from():
    logger = Logger(None, 4, torch.device("meta"))
    logger.start(0, {"sums": {"loss": 2.0, "G/grad_norm": None}, "weights": {"loss": 1.0}}, {})
    logger.add("G", {"loss": torch.tensor(1.0), "other": torch.ones((), device="meta")}, 0.5)
    assert logger.groups["G"].sums.device.type == "meta"


def test_a_fade_in_works_under_the_autocast_of_a_gpu():
    # torch.autocast itself turns off where there is no GPU; its dispatch rules do not need one.
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    try:
        G = ProgressiveGenerator(8, z_dim=4, channel_base=32, channel_max=8)
        G.set_fade(0.5, fading=True)
        shapes = {name: tensor.shape for name, tensor in G.state_dict().items()}
        with FakeTensorMode():
            tensors = {name: torch.empty(s, device="cuda") for name, s in shapes.items()}
            z = torch.empty(2, 4, device="cuda")
            images = torch.func.functional_call(G, tensors, z)
    finally:
        torch.set_autocast_enabled("cuda", False)
    assert (images.device.type, images.dtype) == ("cuda", torch.float32)


def test_long_times_are_told_whole():
    assert duration(3723) == "1:02:03"
    assert duration(30 * 3600 + 62) == "1 d 6:01:02"
