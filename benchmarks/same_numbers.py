"""Trains tiny runs with two versions of dinogen and compares them bit for bit, or nearly.

    python benchmarks/same_numbers.py --code ../before --data /tmp/same --out before.json
    python benchmarks/same_numbers.py --code . --data /tmp/same --out after.json
    python benchmarks/same_numbers.py --compare before.json after.json

``--code`` is a checkout (a git worktree of any commit) whose ``dinogen`` command is run; everything
else is this file's. The runs are all families, the guided one with each objective, with each kind
of discriminator, with text, a reference batch and microbatches, and two families with two stages
and a fade-in. All of them read the one dataset in ``--data``, which the first call makes with the
code that this file belongs to. So a version before a change of the format has to read it as well.

``--out`` is JSON: per run and stage the SHA-256 of the weights, moving averages and optimizer state
(``files``), of the lines of stats.jsonl without what a clock measured (``stats``), of the sample
grid, of ``dinogen sample`` and, for some, the metric values of ``dinogen evaluate``. ``--compare``
names what differs and ends with 1 if anything does. About two minutes a version on one core.

Where a change is one of floating-point order alone, the numbers themselves are compared:

    python benchmarks/same_numbers.py --code ../before --data /tmp/same --steps 20 --keep /tmp/one
    python benchmarks/same_numbers.py --code . --data /tmp/same --steps 20 --keep /tmp/two
    python benchmarks/same_numbers.py --apart /tmp/one /tmp/two

``--keep`` keeps the weights, averages and optimizer state of each run. ``--apart`` prints how far
those of two versions are apart: the largest difference of any two numbers of a file over the
largest number in it. It ends with 1 where that is more than ``--tolerance``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
CLOCK = ("images_per_s", "training_s", "data_wait", "save_share", "seconds", "peak_memory_mb")
# Measured beside training: by O-Net for families other than guided, since 0.2.
BESIDE = ("diversity",)
# Parts of the names of curves that 0.1 called otherwise.
RENAMED = {"place": "location", "map": "global"}
RESOLUTION, BATCH = 16, 8
HELD_OUT = {"eval": {"every_kimg": 0.016}}
TEXT = {"embed_dim": 64, "dropout": 0.3, "noise": 0.2}
SETS = {"objectives": [{"name": "energy", "weight": 0.5}, {"name": "mse", "weight": 0.1}]}
STAGES = [
    {"resolution": 8, "kimg": 0.024, "batch": BATCH, "lr": 1e-3},
    {"resolution": 16, "kimg": 0.032, "fade_kimg": 0.016, "batch": BATCH, "lr": 1e-3},
]
PROGRESSIVE = {"z_dim": 8, "channel_base": 64, "channel_max": 8, "r1_every": 2}
UNET = {
    "base_channels": 8,
    "channel_multipliers": [1, 2],
    "num_blocks": 1,
    "attention_resolutions": [8],
    "head_channels": 8,
    "num_steps": 50,
    "sample_steps": 4,
    "num_classes": 2,
    "guidance": 2,
}
STYLES = {
    "z_dim": 8,
    "w_dim": 8,
    "channel_base": 128,
    "channel_max": 8,
    "num_classes": 2,
    "r1_every": 2,
    "path_every": 2,
    "ada_kimg": 0.1,
}
PATCH = {
    "kind": "patch",
    "from_resolution": 16,
    "loss": "relativistic",
    "r1": 1.0,
    "r2": 1.0,
    "every": 2,
    "ramp_kimg": 0.016,
    "patch_scales": 1,
    "patch_layers": 1,
    "patch_channels": 8,
}
PROJECTED = {"from_resolution": 16, "head_channels": 8, "grid": 2, "ramp_kimg": 0}
OBJECTIVES: dict[str, list[dict[str, Any]]] = {
    "mse": [{"name": "mse"}],
    "paired": [{"name": "paired", "normalize": True}],
    "latents": [{"name": "paired", "num_latents": 17}],
    "energy": [{"name": "energy"}, {"name": "mse", "weight": 0.1, "guides": ["main"]}],
    "mmd": [{"name": "mmd"}],
    "sliced_wasserstein": [{"name": "sliced_wasserstein", "num_slices": 4}],
    "drift": [{"name": "drift", "views": ["place", "map"], "widths": [0.1, 0.3]}],
}


def cases() -> dict[str, dict[str, Any]]:
    """What differs from run to run: sections of the config by the name of the run."""
    found: dict[str, dict[str, Any]] = {
        "dcgan": {"family": {"name": "dcgan", "z_dim": 8, "ngf": 4, "ndf": 4}},
        "wgan_gp": {"family": {"name": "wgan_gp", "z_dim": 8, "channels": 4, "channel_max": 8}},
        "sagan": {
            "family": {
                "name": "sagan",
                "z_dim": 8,
                "channels": 8,
                "channel_max": 8,
                "attention": [8],
            }
        },
        "progressive_gan": {"family": {"name": "progressive_gan", **PROGRESSIVE}},
        "stylegan2_ada": {"family": {"name": "stylegan2_ada", **STYLES}},
        "vae": {
            "family": {
                "name": "vae",
                "latent": 8,
                "base_channels": 8,
                "lambda_perceptual": 0.1,
                "perceptual_weights": "random",
            },
            **HELD_OUT,
        },
        "vae_gan": {
            "family": {
                "name": "vae_gan",
                "latent": 8,
                "base_channels": 8,
                "d_layers": 1,
                "d_channels": 8,
            },
            **HELD_OUT,
        },
        "ddpm": {"family": {"name": "ddpm", **UNET}, **HELD_OUT},
    }
    found |= {f"guided_{name}": guided(objectives=terms) for name, terms in OBJECTIVES.items()}
    found["guided_patch"] = guided(**SETS, discriminator=PATCH)
    found["guided_projected"] = guided(**SETS, discriminator=PROJECTED)
    found["guided_parts"] = guided(**SETS, bank=6) | {"engine": {"micro_batch": 3}}
    for condition in ("images", "captions"):
        own = {
            "objectives": [{"name": "energy", "views": ["map"]}],
            "bank": 6,
            "text": {**TEXT, "condition": condition},
        }
        found[f"guided_text_{condition}"] = guided(**own) | {"engine": {"micro_batch": 4}}
    found["stages_guided"] = guided(objectives=OBJECTIVES["mse"]) | {"stages": STAGES}
    found["stages_progressive_gan"] = {
        "family": {"name": "progressive_gan", **PROGRESSIVE},
        "stages": STAGES,
    }
    return found


def guided(**options: Any) -> dict[str, Any]:
    """Sections of a run of the guided family with some options."""
    small = {"z_dim": 8, "channel_base": 64, "channel_max": 16, "probe_samples": 4}
    own: dict[str, Any] = {"family": {"name": "guided", **small, **options}}
    own["guides"] = {"pixels": {"name": "pixels"}}
    return own | HELD_OUT


EVALUATED = {
    "stylegan2_ada": ["fd_onet"],
    "ddpm": ["held_out", "fd_onet"],
    "vae": ["held_out", "fd_onet", "reconstruction_psnr"],
    "guided_text_captions": ["held_out", "fd_onet", "clip_score", "guide_diversity"],
}


def main() -> None:
    """Train with one version, or compare what two came to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--code", type=Path, help="checkout whose dinogen is run")
    parser.add_argument("--data", type=Path, help="folder of the dataset, made if it is missing")
    parser.add_argument("--out", type=Path, help="JSON to write")
    parser.add_argument("--only", default="", help="runs whose name holds this")
    parser.add_argument("--compare", type=Path, nargs=2, metavar="JSON")
    parser.add_argument("--steps", type=int, default=4, help="of each stage")
    parser.add_argument("--keep", type=Path, help="folder for what the runs end with")
    parser.add_argument("--apart", type=Path, nargs=2, metavar="FOLDER")
    parser.add_argument("--tolerance", type=float, default=1e-3)
    parser.add_argument("--here", type=Path, help=argparse.SUPPRESS)  # where the child works
    options = parser.parse_args()
    if options.compare:
        sys.exit(compare(*(json.loads(path.read_text()) for path in options.compare)))
    if options.apart:
        sys.exit(apart(*options.apart, options.tolerance))
    if options.here:
        train_all(options)
        return
    if not (options.code and options.data and (options.out or options.keep)):
        parser.error("give --code, --data, and --out or --keep; or --compare; or --apart")
    data = options.data.absolute()
    if not (data / "packed" / "manifest.json").is_file():
        run_python(ROOT, "from benchmarks.same_numbers import make_data; make_data()", data)
    with tempfile.TemporaryDirectory() as work:
        command = [str(Path(__file__).resolve()), "--here", work, "--data", str(data)]
        command += ["--only", options.only, "--steps", str(options.steps)]
        for name in ("out", "keep"):
            if path := getattr(options, name):
                command += [f"--{name}", str(path.absolute())]
        done = subprocess.run([sys.executable, *command], env=environment(options.code), cwd=work)
    sys.exit(done.returncode)


def environment(code: Path) -> dict[str, str]:
    """Of a process that imports what is ours from a checkout, offline and on one thread."""
    return os.environ | {
        "PYTHONPATH": str(code.absolute()),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }


def run_python(code: Path, words: str, *arguments: Path) -> None:
    """Run a line of Python with the modules of a checkout."""
    command = [sys.executable, "-c", words, *map(str, arguments)]
    subprocess.run(command, env=environment(code), cwd=code, check=True)


def make_data() -> None:
    """24 drawn discs of 16x16 with labels, captions, two guides' features and embeddings."""
    import io

    import numpy as np
    import torch
    from PIL import Image

    from dinogen.config import GuideConfig
    from dinogen.config.training import ClipConfig
    from dinogen.features.clip import load_clip
    from dinogen.features.dinov2 import make_random_dinov2
    from dinogen.features.load import load_guide
    from dinogen.features.pyramid import native_pyramid
    from shards.format.sample import Sample
    from shards.write.shard_writer import pack
    from tests.tiny_clip import random_clip

    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    make_random_dinov2(folder / "guide", seed=0, hidden_size=16, num_layers=1, num_heads=2)
    cpu = torch.device("cpu")
    clip = load_clip(ClipConfig(path=str(random_clip(folder / "clip"))), cpu)
    main = load_guide(GuideConfig(path=str(folder / "guide")), cpu)
    guides = {"": main, "pixels.": load_guide(GuideConfig(name="pixels"), cpu)}
    rng = np.random.default_rng(0)
    yy, xx = np.mgrid[:RESOLUTION, :RESOLUTION] / RESOLUTION
    samples = []
    for number in range(24):
        cx, cy, radius = [*rng.uniform(0.3, 0.7, 2).tolist(), rng.uniform(0.15, 0.3)]
        inside = (xx - cx) ** 2 + (yy - cy) ** 2 < radius**2
        pixels = np.where(inside[..., None], rng.integers(128, 255, 3), rng.integers(0, 100, 3))
        pixels = pixels.astype(np.uint8)
        image = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 127.5 - 1
        caption = f"a disc, number {number % 5}"
        with torch.no_grad():
            levels = {
                f"{prefix}n{grid}": values[0].half().numpy()
                for prefix, guide in guides.items()
                for grid, values in native_pyramid(guide, image, (8, 16)).items()
            }
            levels["clip"] = clip.images(image).half().numpy()
            levels["text"] = clip.captions([caption]).half().numpy()
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        key, label = f"disc{number:03d}", number % 2
        samples.append(
            Sample(key, file.getvalue(), "png", {}, levels, label=label, caption=caption)
        )
    pack(
        samples,
        folder / "packed",
        shard_size=8,
        val_fraction=0.25,
        guide=main.info.to_dict(),
        guides={"pixels": guides["pixels."].info.to_dict()},
        clip=clip.info,
    )


def train_all(options: argparse.Namespace) -> None:
    """In the child: train, sample and evaluate every run, and write what each came to."""
    import yaml

    work, data = options.here, options.data
    kimg = options.steps * BATCH / 1000
    found: dict[str, Any] = {}
    for name, own in cases().items():
        if options.only not in name:
            continue
        run = work / name
        config = {
            "run": str(run),
            "data": {"path": str(data / "packed"), "num_threads": 0},
            "guide": {"path": str(data / "guide")},
            "stages": [{"resolution": RESOLUTION, "kimg": 0.032, "batch": BATCH, "lr": 1e-3}],
            "optim": {"eps": 1e-5},
            "checkpoint": {"every_kimg": 1},
            "log": {"every_kimg": 0.008, "probe_kimg": 0.016, "samples_kimg": 1, "num_samples": 4},
            "device": "cpu",
            **own,
        }
        for stage in config["stages"] if options.steps != 4 else ():
            stage["kimg"] = kimg
        if own["family"]["name"] != "guided":
            config["augment"] = {"flip": 0.5, "rotate": 5}
        if "text" in own["family"]:
            config["clip"] = {"path": str(data / "clip")}
        path = work / f"{name}.yaml"
        path.write_text(yaml.safe_dump(config))
        dinogen("train", str(path))
        if options.keep:
            keep(run, options.keep / name)
        if not options.out:
            print(name, flush=True)
            continue
        found[name] = {
            folder.name: stage_of(folder) for folder in sorted(run.glob("*x*")) if folder.is_dir()
        }
        found[name]["sample"] = drawn(run, work / "drawn" / name)
        if "text" in own["family"]:
            asked = ["--text", "a disc", "--text", "number 3", "--guidance", "2"]
            found[name]["asked"] = drawn(run, work / "drawn" / f"{name}_asked", *asked)
        if name in EVALUATED:
            found[name]["evaluate"] = metric_values(run, data, work, EVALUATED[name])
        print(name, flush=True)
    if options.out:
        options.out.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")


def dinogen(*words: str) -> None:
    """Run one command of the checkout on the path, in this process."""
    sys.argv = ["dinogen", *words]
    try:
        runpy.run_module("launch.cli", run_name="__main__")
    except SystemExit as error:
        if error.code:
            raise RuntimeError(f"dinogen {' '.join(words)} ended with {error.code}") from error


def newest_of(folder: Path) -> Path:
    """The newest checkpoint of a stage."""
    return max(p for p in (folder / "checkpoints").iterdir() if p.name.isdigit())


def keep(run: Path, folder: Path) -> None:
    """Copy what the stages of a run ended with."""
    for stage in (path.parent for path in run.glob("*/checkpoints")):
        for path in newest_of(stage).glob("*.safetensors"):
            target = folder / stage.name / path.name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)


def apart(before: Path, after: Path, tolerance: float) -> int:
    """Print how far what two versions ended with is apart; 1 if it is more than allowed."""
    from safetensors.torch import load_file

    wrong = 0
    for path in sorted(before.rglob("*.safetensors")):
        name = path.relative_to(before)
        one, two = load_file(path), load_file(after / name)
        differs = max(float((one[key].double() - two[key]).abs().max()) for key in one)
        share = differs / max(float(value.double().abs().max()) for value in one.values())
        worse = one.keys() != two.keys() or not share <= tolerance
        wrong += worse
        print(f"{name!s:<48}{share:10.1e}{'  APART' if worse else ''}")
    print(f"{wrong} files further apart than {tolerance:g}")
    return int(bool(wrong))


def stage_of(folder: Path) -> dict[str, Any]:
    """Hashes of what a stage of a run left."""
    newest = newest_of(folder)
    return {
        "nimg": int(newest.name),
        "files": {path.name: tensors(path) for path in sorted(newest.glob("*.safetensors"))},
        "stats": digest(lines(folder / "stats.jsonl")),
        "grid": digest(path.read_bytes() for path in sorted((folder / "samples").glob("*.png"))),
    }


def tensors(path: Path) -> str:
    """Of names, types, shapes and bytes, whatever else the file holds."""
    import torch
    from safetensors.torch import load_file

    found = load_file(path)
    return digest(
        part
        for name in sorted(found)
        for part in (
            f"{name} {found[name].dtype} {tuple(found[name].shape)}".encode(),
            found[name].contiguous().flatten().view(torch.uint8).numpy().tobytes(),
        )
    )


def lines(path: Path) -> Iterable[bytes]:
    """Lines of a log without what a clock measured."""
    for line in path.read_text().splitlines():
        found = json.loads(line)
        values = {today(key): value for key, value in found.items() if key not in CLOCK + BESIDE}
        yield json.dumps(values, sort_keys=True).encode()


def today(key: str) -> str:
    """The name of a curve, whichever version wrote it."""
    parts = [RENAMED.get(part, part) for part in key.split(".")]
    return ".".join(parts)


def drawn(run: Path, folder: Path, *words: str) -> str:
    """Of the pixels that ``dinogen sample`` draws."""
    dinogen("sample", str(run), "--num", "4", "--seed", "1", "--out", str(folder), *words)
    # not of the files: their metadata says how they were made
    paths = sorted(folder.glob("0000*.png"))
    return digest(Image.open(path).convert("RGB").tobytes() for path in paths)


def metric_values(run: Path, data: Path, work: Path, names: list[str]) -> Any:
    """What ``dinogen evaluate`` measures of a run, held-out samples and probe among it."""
    prompts = work / "prompts.txt"
    prompts.write_text("a disc\nnumber 3\n")
    out = work / "evaluated" / f"{run.name}.json"
    out.parent.mkdir(exist_ok=True)
    changes = [f"metrics.cache={work / 'cache'}", "metrics.num_bootstrap=2"]
    if "clip_score" in names:
        changes += [f"metrics.clip={data / 'clip'}", f"metrics.prompts={prompts}"]
    asked = ["--metrics", ",".join(names), "--num-samples", "8", "--out", str(out)]
    dinogen("evaluate", str(run), *asked, *changes)
    found = json.loads(out.read_text())
    values = {name: one["value"] for name, one in found["measured"].items()}
    return {
        "own": found["metrics"],
        "measured": values,
        "health": found.get("health", found.get("verdict")),
    }


def digest(parts: Iterable[bytes]) -> str:
    """SHA-256 of parts, each with its length."""
    found = hashlib.sha256()
    for part in parts:
        found.update(len(part).to_bytes(8, "little") + part)
    return found.hexdigest()


def compare(before: dict[str, Any], after: dict[str, Any]) -> int:
    """Say what differs; 1 if anything does."""
    one, two = dict(leaves(before)), dict(leaves(after))
    wrong = [key for key in sorted(one.keys() | two.keys()) if one.get(key) != two.get(key)]
    for key in wrong:
        print(f"DIFFERS {key}: {one.get(key)} -> {two.get(key)}")
    print(f"{len(one.keys() | two.keys()) - len(wrong)} values the same, {len(wrong)} differ")
    return int(bool(wrong))


def leaves(values: Any, path: str = "") -> Iterable[tuple[str, Any]]:
    """Values of a nested dict by their path."""
    if not isinstance(values, dict):
        yield path, values
        return
    for key, value in values.items():
        yield from leaves(value, f"{path}/{key}")


if __name__ == "__main__":
    main()
