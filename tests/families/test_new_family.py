"""docs/new-family.md: its two files, those of examples/, train, resume and are exported."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dinogen.config import ConfigError, load_config
from dinogen.families.registry import family_options, resolve
from dinogen.training.checkpointing.checkpoint import newest_checkpoint
from dinogen.training.checkpointing.export import export, load_exported
from dinogen.training.run import train
from shards.format.sample import Sample
from shards.write.shard_writer import pack

EXAMPLES = Path(__file__).parents[2] / "examples"
FIVE_STEPS = [
    "data.num_threads=0",
    "stages=[{resolution: 16, kimg: 0.04, batch: 8}]",
    "log={every_kimg: 0.016, num_samples: 4}",
]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder as of someone who follows the page: two files and packed images without levels."""
    monkeypatch.chdir(tmp_path)
    for name in ("tiny_gan.py", "tiny_gan.yaml"):
        shutil.copyfile(EXAMPLES / name, tmp_path / name)
    rng = np.random.default_rng(0)
    samples = []
    for number in range(24):
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(file, "PNG")
        samples.append(Sample(f"noise{number:02d}", file.getvalue(), "png", {}, {}))
    pack(samples, tmp_path / "data" / "faces", shard_size=12)
    return tmp_path


def tensors(folder):
    """Weights of a run's newest checkpoint, and its number of steps."""
    found = newest_checkpoint(folder / "16x16" / "checkpoints")
    steps = found.state["progress"]["step"]
    return {name: found.tensors(name) for name in ("G", "D", "G.ema", "optim")}, steps


def test_the_page_s_family_trains_and_both_networks_change(here):
    config = load_config("tiny_gan.yaml", FIVE_STEPS)
    assert config.family.name == "tiny_gan"
    assert family_options(config).z_dim == 32
    (result,) = train(config)
    found, steps = tensors(config.run)
    assert steps == 5 and result["family"] == "tiny_gan" and not result.get("random_guide")

    train(load_config("tiny_gan.yaml", [*FIVE_STEPS, "run=one", "stages.0.kimg=0.008"]))
    first, _ = tensors(Path("one"))
    for network in ("G", "D", "G.ema"):
        for name, value in found[network].items():
            # hinge: D's last bias has a gradient of zero while all logits are within the margins
            same = torch.equal(value, first[network][name])
            assert not same or (network, value.shape) == ("D", (1,)), f"{network}/{name}"
    line = json.loads((config.run / "16x16" / "stats.jsonl").read_text().splitlines()[-1])
    assert {"D/hinge", "D/real", "D/fake", "G/hinge", "loss"} <= line.keys()


def test_resumed_it_ends_bitwise_as_uninterrupted(here):
    train(load_config("tiny_gan.yaml", FIVE_STEPS))
    whole, _ = tensors(Path("runs/tiny_gan"))
    for kimg in (0.016, 0.04):
        train(load_config("tiny_gan.yaml", [*FIVE_STEPS, "run=parts", f"stages.0.kimg={kimg}"]))
    parts, steps = tensors(Path("parts"))
    assert steps == 5
    for file, values in whole.items():
        assert [name for name in values if not torch.equal(values[name], parts[file][name])] == []


def test_exported_its_generator_is_rebuilt_from_the_file(here):
    train(load_config("tiny_gan.yaml", FIVE_STEPS))
    export(Path("runs/tiny_gan"), here / "G.safetensors")
    G, info = load_exported(here / "G.safetensors")
    assert info["family"] == "tiny_gan"
    images = G(torch.randn(3, 32))
    assert images.shape == (3, 3, 16, 16) and images.abs().max() <= 1


def test_its_options_are_checked_like_those_of_any_family(here):
    with pytest.raises(ConfigError, match=r"family: z_dim: .* 1, not 0"):
        resolve(load_config("tiny_gan.yaml", ["family.z_dim=0"]))
    with pytest.raises(ConfigError, match=r"family: .*zdim.*z_dim"):
        resolve(load_config("tiny_gan.yaml", ["family.zdim=3"]))
