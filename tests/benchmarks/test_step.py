"""A step waits for nothing and launches few kernels: shipped configs, by benchmarks/step.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.benchmarks.without_gpu import needs_fake_cuda

ROOT = Path(__file__).parents[2]

# Most launches of a step where lazy regularisers are due, and of one where they are not, at bf16:
# half of what it was when each draw, mask and matrix of augmentation was a chain of small kernels.
MOST_LAUNCHES = {
    "dcgan_64": (367, 367),
    "ddpm_v_64": (1423, 1423),
    "guided_64": (552, 552),
    "guided_energy_64": (818, 818),
    "guided_energy_d_64": (1349, 1349),
    "guided_text_64": (1534, 1534),
    "progressive_gan_64": (685, 532),
    "sagan_hinge_64": (1059, 1059),
    "sagan_wgan_gp_64": (1160, 816),
    "stylegan2_ada_64": (4999, 1980),
    "vae_64": (359, 359),
    "vae_gan_64": (871, 871),
    "wgan_gp_64": (1145, 870),
}
BATCH = "stages.0.batch=64"  # at which that was; parts of a larger one launch as much each
OTHERS = {
    "fp16": ("dcgan_64 progressive_gan_64 guided_text_64", "engine.precision=fp16"),
    "fp32": ("dcgan_64", "engine.precision=fp32"),
    "latents": ("flow_latent_fast", "engine.precision=bf16"),
    "two ranks": ("vae_64 wgan_gp_64 guided_energy_64", "engine.precision=bf16", "--ranks", "2"),
}

DENOISERS = {
    "flow": "{name: flow, base_channels: 32, head_channels: 32, dropout: 0.1}",
    "flow, transformer, classes": "{name: flow, network: dit, dit: {patch: 8}, num_classes: 3}",
    "edm": "{name: ddpm, prediction: edm, base_channels: 32, head_channels: 32}",
    "min-SNR": "{name: ddpm, min_snr: 5, base_channels: 32, head_channels: 32}",
}

pytestmark = needs_fake_cuda


def counted(file, names, *options):
    """What the command finds for some configs, by their names."""
    script = ROOT / "benchmarks" / "step.py"
    precision, *more = options
    command = [sys.executable, script, *names, "--set", BATCH, precision, *more, "--json", file]
    there = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=there, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return json.loads(file.read_text())["configs"]


def waits(step):
    """Lines at which the host waits for the device."""
    return {**step["all"]["syncs"], **step["all"]["blocking"]}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Counts of all of the table."""
    return counted(tmp_path_factory.mktemp("step") / "json", MOST_LAUNCHES, "engine.precision=bf16")


@pytest.mark.parametrize("name", MOST_LAUNCHES)
def test_a_step_waits_for_nothing(found, name):
    assert {number: waits(step) for number, step in found[name]["steps"].items()} == {
        "0": {},
        "1": {},
    }


@pytest.mark.parametrize("name", MOST_LAUNCHES)
def test_a_step_launches_few_kernels(found, name):
    launched = [found[name]["steps"][number]["all"]["launches"] for number in "01"]
    assert all(num <= most for num, most in zip(launched, MOST_LAUNCHES[name], strict=True)), (
        f"{launched} of {MOST_LAUNCHES[name]}"
    )


def test_a_step_of_flow_or_edm_waits_for_nothing(tmp_path):
    files = {}
    for number, (kind, family) in enumerate(DENOISERS.items()):
        files[kind] = tmp_path / f"{number}.yaml"
        files[kind].write_text(f"family: {family}\nstages: [{{resolution: 64, kimg: 100}}]\n")
    names = [str(file) for file in files.values()]
    found = counted(tmp_path / "json", names, "engine.precision=bf16", "--steps", "1")
    assert {kind: waits(found[str(file)]["steps"]["1"]) for kind, file in files.items()} == {
        kind: {} for kind in DENOISERS
    }


@pytest.mark.parametrize("kind", OTHERS)
def test_a_step_waits_for_nothing_in_any_precision_or_on_two_ranks(tmp_path, kind):
    names, *options = OTHERS[kind]
    configs = counted(tmp_path / "json", names.split(), *options, "--steps", "1")
    found = {name: waits(config["steps"]["1"]) for name, config in configs.items()}
    assert found == {name: {} for name in names.split()}


# hidden tokens of a small transformer, aligned with features of both orientations
REPA = """
guide: {name: dinov2, path: facebook/dinov2-small}
augment: {flip: 0.5}
family:
  name: flow
  network: dit
  dit: {width: 64, depth: 2, num_heads: 2, patch: 4}
  repa: {layer: 1, until_kimg: 1}
stages: [{resolution: 64, kimg: 100, lr: 1.0e-4}]
"""


def test_alignment_waits_for_nothing(tmp_path):
    (tmp_path / "repa.yaml").write_text(REPA)
    name = str(tmp_path / "repa.yaml")
    found = counted(tmp_path / "json", [name], "engine.precision=bf16", "--steps", "1")
    assert waits(found[name]["steps"]["1"]) == {}


# a feature that a small network generates, and images from it, in both orientations
RCG = """
guide: {name: dinov2, path: facebook/dinov2-small}
augment: {flip: 0.5}
family:
  name: flow
  network: dit
  num_classes: 2
  dit: {width: 64, depth: 2, num_heads: 2, patch: 4}
  representation: {width: 64, depth: 2}
stages: [{resolution: 64, kimg: 100, lr: 1.0e-4}]
"""


@pytest.mark.parametrize("ranks", [[], ["--ranks", "2"]])
def test_generating_the_features_first_waits_for_nothing(tmp_path, ranks):
    (tmp_path / "rcg.yaml").write_text(RCG)
    name = str(tmp_path / "rcg.yaml")
    found = counted(tmp_path / "json", [name], "engine.precision=bf16", "--steps", "1", *ranks)
    assert waits(found[name]["steps"]["1"]) == {}
