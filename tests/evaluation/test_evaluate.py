"""`dinogen evaluate`: held-out samples, each counted once, the same on any number of ranks."""

import json

import pytest
import torch
from typer.testing import CliRunner

from dinogen.config import ConfigError, GuideConfig, dump_config
from dinogen.distributed import rng
from dinogen.evaluation import subject as module
from dinogen.evaluation.evaluate import evaluate
from dinogen.families.guided import Guided
from dinogen.features.load import load_guide
from dinogen.features.pyramid import native_pyramid
from dinogen.training.checkpointing.export import export, load_exported
from dinogen.training.run import train
from launch.cli.main import app
from shards import open_dataset, pack
from shards.errors import CorruptSample
from tests.forked import torchrun
from tests.training.helpers import stage

EVALUATE = ("-m", "launch.cli", "evaluate")


@pytest.fixture(scope="module")
def split_data(tmp_path_factory, data_folder):
    """The 40 discs, some of them in val."""
    data = open_dataset(data_folder)
    folder = tmp_path_factory.mktemp("split") / "discs"
    samples = (data.sample(n) for n in range(data.num_samples()))
    guide = data.manifest.guide
    manifest = pack(samples, folder, shard_size=8, val_fraction=0.45, guide=guide)
    assert manifest.splits["val"].num_samples > 8
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("evaluated")


@pytest.fixture
def config(make_config, split_data, place):
    """A run of both stages on the train part, trained once."""
    made = make_config(f"data.path={split_data}", run=str(place / "run"))
    if not made.run.exists():
        train(made)
    return made


def written(config, resolution=8):
    return json.loads((stage(config, resolution) / "evaluation.json").read_text())


def by_hand(config, data, split, numbers, tmp_path, guide_folder):
    """Held-out loss and its samples one by one, through an exported generator."""
    path = export(config.run, tmp_path / "G.safetensors", 8).path
    generator, _ = load_exported(path)
    guide = load_guide(GuideConfig(path=str(guide_folder)), torch.device("cpu"))
    losses = []
    for number in numbers:
        z = rng.normal(config.seed, "z/held-out", torch.tensor([number]), (8,))
        with torch.no_grad():
            features = native_pyramid(guide, generator(z), (8,))[8][0]
        real = torch.from_numpy(data.sample(number, split).levels["n8"].copy()).float()
        losses.append(float((features - real).double().square().mean()))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("split", ["val", "train"])
def test_the_value_is_the_mean_over_every_sample(
    config, split_data, split, tmp_path, guide_folder, monkeypatch
):
    monkeypatch.setattr(module, "BATCH", 5)  # the last batch is smaller
    data = open_dataset(split_data)
    num = data.num_samples(split)
    result = evaluate(config.run, split=split)
    assert result == written(config)
    expected = by_hand(config, data, split, range(num), tmp_path, guide_folder)
    assert result["metrics"]["held_out/mse"] == pytest.approx(expected, rel=1e-5)
    assert (result["num_samples"], result["split"], result["nimg"]) == (num, split, 240)
    # the probe is that of training
    trained = json.loads((stage(config, 8) / "result.json").read_text())
    for key in ("diversity", "loss_over_floor"):
        assert result["metrics"][f"probe/{key}"] == pytest.approx(trained[key], rel=1e-6)
    assert (result["health"], result["warnings"]) == (trained["health"], trained["warnings"])
    assert result["floor"] == (trained["floor"] if split == "train" else None)
    diversity = result["measured"]["guide_diversity"]
    assert diversity["value"] == result["metrics"]["probe/diversity"]
    assert diversity["num_samples"] == 8
    assert result["random_guide"] is True and result["guide_label"] == "RANDOM guide (dinov2)"


def test_some_of_the_samples(config, split_data, tmp_path, guide_folder):
    data = open_dataset(split_data)
    num = data.num_samples("val")
    result = evaluate(config.run, num_samples=2)
    expected = by_hand(config, data, "val", [0, num - 1], tmp_path, guide_folder)
    assert result["metrics"]["held_out/mse"] == pytest.approx(expected, rel=1e-5)
    assert result["num_samples"] == 2
    more = evaluate(config.run, num_samples=10_000, names=["held_out"])
    assert more["num_samples"] == num


@pytest.mark.parametrize(("num_ranks", "num"), [(2, 9), (3, 2)])
def test_any_number_of_ranks_gives_the_same(config, num_ranks, num):
    """A count that the ranks do not divide, and fewer samples than ranks."""
    alone = evaluate(config.run, num_samples=num)
    done = torchrun(num_ranks, *EVALUATE, config.run, "--num-samples", num)
    assert done.returncode == 0, done.stderr[-3000:]
    together = written(config)
    assert (together.pop("world_size"), alone.pop("world_size")) == (num_ranks, 1)
    metrics = together.pop("metrics")
    assert metrics == pytest.approx(alone.pop("metrics"), rel=1e-5)
    metric_values, same = (one.pop("measured") for one in (together, alone))
    there = {name for name, metric_value in same.items() if metric_value["value"] is not None}
    assert {"guide_diversity", "faces", "kd_onet", "spectrum"} <= there
    for name in there:
        assert metric_values[name]["value"] == pytest.approx(same[name]["value"], rel=1e-4), name
    assert together.pop("sampling")["num"] == alone.pop("sampling")["num"]
    assert together == alone
    assert done.stdout.count("held_out/mse") == 1
    assert f"{num} samples of val" in done.stdout


def test_an_error_on_all_ranks_ends_them(make_config, tmp_path):
    train(make_config("stages.0.kimg=0.04"), 4)
    done = torchrun(2, *EVALUATE, make_config().run, "--split", "dev")
    assert done.returncode == 1
    assert "splits are train, val, test" in done.stderr
    assert not (stage(make_config(), 4) / "evaluation.json").exists()


def test_the_command_and_its_errors(config, make_config, data_folder, tmp_path):
    def command(*args):
        return CliRunner().invoke(app, ["evaluate", *map(str, args)])

    done = command(config.run, "--stage", 4)
    assert done.exit_code == 0, done.output
    result = written(config, 4)
    assert f"stage 4x4 at 80 images, {result['num_samples']} samples of val" in done.stdout
    assert f"held_out/mse: {result['metrics']['held_out/mse']:.6g}" in done.stdout
    assert "RANDOM guide" in done.stdout and "4x4/evaluation.json" in done.stdout

    plain = make_config("stages.0.kimg=0.04")
    train(plain, 4)
    other = make_config(f"data.path={config.data.path}", run="other")
    train(other, 4)
    beside = other.run / "config.yaml"
    beside.write_text(dump_config(other).replace(str(config.data.path), str(data_folder)))
    for args, message in [
        ((tmp_path,), "no run here"),
        ((config.run, "--stage", 16), "stage 16 is not in the config"),
        ((config.run, "--split", "dev"), "splits are train, val, test"),
    ]:
        done = command(*args)
        assert isinstance(done.exception, ConfigError), (args, done.output)
        assert message in str(done.exception), (args, done.exception)
    # what is missing is a reason, and costs only the metric values that need it
    for args, message in [
        ((config.run, "--split", "test"), "prepare.pack.test_fraction"),
        ((plain.run,), "has no samples in split val (but 40 in train): prepare again with "),
        ((plain.run,), "prepare.pack.val_fraction=0.5 or more"),
        ((plain.run,), "--split train"),
        ((other.run,), "holds other shards than the checkpoint"),
        ((other.run,), "was trained on: set data.path= to the shards that it was trained on, or"),
    ]:
        done = command(*args, "--num-samples", 20)
        assert done.exit_code == 0, (args, done.output, done.exception)
        assert message in done.stdout and "  faces: " in done.stdout, (args, done.output)
        assert "run=" not in done.stdout


@pytest.mark.parametrize("num", [None, 1])
def test_damaged_samples_are_left_out_or_stop_it(
    config, split_data, monkeypatch, num, tmp_path, guide_folder, caplog
):
    """A level of the first sample of val cannot be read; the probe reads only train."""
    read = type(open_dataset(split_data)).read

    def damaged(self, numbers, *, split="train", on_error="stop", **rest):
        numbers = list(numbers)
        if split == "val" and 0 in numbers:
            if on_error == "stop":
                raise CorruptSample("val-000000.tar", "disc", "n8.npy", "checksum differs")
            numbers = [n or 1 for n in numbers]
        return read(self, numbers, split=split, on_error=on_error, **rest)

    monkeypatch.setattr("shards.read.dataset.Dataset.read", damaged)
    stopped = evaluate(config.run, num_samples=num)
    assert "disc" in stopped["not_measured"]["held_out"]
    assert stopped["health"] and stopped["measured"]["faces"]["value"] is not None
    (stage(config, 8) / "evaluation.json").unlink()

    text = (config.run / "config.yaml").read_text()
    (config.run / "config.yaml").write_text(text.replace("on_error: stop", "on_error: skip"))
    try:
        if num == 1:
            said = evaluate(config.run, num_samples=num)["not_measured"]["held_out"]
            assert "all 1 requested samples of split val are damaged" in said
            return
        result = evaluate(config.run)
    finally:
        (config.run / "config.yaml").write_text(text)
    data = open_dataset(split_data)
    total = data.num_samples("val")
    assert (result["num_samples"], result["num_skipped"]) == (total - 1, 1)
    assert "left out: val-000000.tar" in caplog.text
    expected = by_hand(config, data, "val", range(1, total), tmp_path, guide_folder)
    assert result["metrics"]["held_out/mse"] == pytest.approx(expected, rel=1e-5)


def test_values_that_are_not_finite_are_null(config, monkeypatch):
    monkeypatch.setattr(Guided, "held_out", lambda *_: {"mse": torch.tensor(float("nan"))})
    evaluate(config.run)
    assert written(config)["metrics"]["held_out/mse"] is None


def test_a_family_without_held_out_values_still_has_its_probe(config, monkeypatch, tmp_path):
    # not by removing the method: what a class can do is remembered once it was asked
    monkeypatch.setattr("dinogen.evaluation.evaluate.MeasuresHeldOut", type("Nobody", (), {}))
    metrics = evaluate(config.run, out=tmp_path)["metrics"]
    assert set(metrics) == {"probe/diversity", "probe/loss_over_floor"}


def test_the_device_is_chosen_before_ranks_join(config, monkeypatch):
    """NCCL would be asked for otherwise, where a run on the CPU has GPUs beside it."""
    chosen = []
    monkeypatch.setattr(module.process_group, "use_device", lambda name: chosen.append(name))
    monkeypatch.setattr(module.process_group, "init", lambda: chosen.append("joined"))
    evaluate(config.run, num_samples=2)
    assert chosen[:2] == ["auto", "joined"]
