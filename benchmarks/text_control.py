"""Whether words steer a generator: drawn faces asked for in combinations that it has never seen.

    python -m benchmarks.text_control --out DIR [--kimg 48] [KEY=VALUE]...

A tiny CLIP is taught on drawn faces, faces are packed with its embeddings, and a guided run is
trained on them without captions. Then images are asked for by captions of the held-out
combinations, and a classifier that no network here was taught by says what they show. Prints its
accuracy per attribute, CLIP score and retrieval, by guidance, and writes grids. Last, of images
that nobody asked for, how far what they show is from the data (total variation by attribute: 0 the
same, 1 nothing in common), and how far they differ (diversity, as logged).
"""

from __future__ import annotations

import argparse
import io
import json
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dinogen.config import GuideConfig, parse_config
from dinogen.config.training import ClipConfig
from dinogen.families.base import sample_in_parts
from dinogen.features.clip import Clip, load_clip
from dinogen.features.load import load_guide
from dinogen.features.pyramid import native_pyramid, pooled_pyramid
from dinogen.metrics.prompted import clip_score, retrieval_accuracy
from dinogen.report.images import save_grid
from dinogen.training.checkpointing.snapshot import load_snapshot
from dinogen.training.run import train
from shards.format.sample import Sample
from shards.write.shard_writer import pack
from tests import drawn, tiny_clip
from tests.drawn_extractor import accuracy, train_extractor

NUM_FACES = 3000
PER_PROMPT = 4
NUM_UNASKED = 512


def pack_faces(out: Path, clip: Clip) -> None:
    """Drawn faces of the combinations that are not held out, with pixels and embeddings."""
    guide = load_guide(GuideConfig(name="pixels"), torch.device("cpu"))
    rows = drawn.some_attributes(NUM_FACES, 0)
    images = drawn.draw(rows, 1)
    tensors = drawn.as_tensor(images)
    whole = native_pyramid(guide, tensors, (32,))[32]
    small = pooled_pyramid(guide, tensors, (8,))[8]
    with torch.no_grad():
        embedded = torch.cat([clip.images(part) for part in tensors.split(250)])
    samples = []
    for number, pixels in enumerate(images):
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        levels = {
            "n32": whole[number].half().numpy(),
            "p8": small[number].half().numpy(),
            "clip": embedded[number].half().numpy()[None],
        }
        samples.append(Sample(f"face{number:05d}", file.getvalue(), "png", {}, levels))
    pack(samples, out, shard_size=1000, guide=guide.info.to_dict(), clip=clip.info)


def measure(run: Path, clip: Clip, guidance: float, extractor: torch.nn.Module) -> dict[str, float]:
    """Accuracies of images of the held-out combinations, CLIP score and retrieval."""
    rows = drawn.combinations()
    prompts = [drawn.caption(row) for row in rows]
    unseen = np.flatnonzero(drawn.held_out(rows))
    snapshot = load_snapshot(run)
    condition = snapshot.condition([prompts[i] for i in unseen], guidance)
    num = PER_PROMPT * len(unseen)
    images = sample_in_parts(
        snapshot.family, snapshot.ema.networks, num, seed=0, condition=condition
    )
    save_grid(images[: len(unseen)].numpy(), run / f"asked_{guidance:g}.png")
    own = torch.from_numpy(np.tile(unseen, PER_PROMPT))
    found = accuracy(extractor.attributes(images), rows[own.numpy()])  # type: ignore[operator]
    with torch.no_grad():
        seen, texts = clip.images(images), clip.captions(prompts)
    found["clip_score"] = clip_score(seen, texts[own])
    found["retrieval of 192"] = retrieval_accuracy(seen, texts, own)
    return found


def measure_unasked(run: Path, extractor: torch.nn.Module) -> dict[str, float]:
    """By attribute, half the sum of |share in samples of nothing - share in the data|."""
    snapshot = load_snapshot(run)
    images = sample_in_parts(snapshot.family, snapshot.ema.networks, NUM_UNASKED, seed=0)
    save_grid(images[:48].numpy(), run / "unasked.png")
    shown = extractor.attributes(images)  # type: ignore[operator]
    real = drawn.some_attributes(NUM_FACES, 0)
    found = {}
    for column, (name, values) in enumerate(drawn.VALUES.items()):
        shares = [
            np.bincount(rows[:, column], minlength=len(values)) / len(rows)
            for rows in (shown, real)
        ]
        found[name] = float(np.abs(shares[0] - shares[1]).sum() / 2)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--kimg", type=float, default=48)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if not (args.out / "clip").exists():
        tiny_clip.trained_clip(args.out / "clip")
    clip = load_clip(ClipConfig(path=str(args.out / "clip")), torch.device("cpu"))
    if not (args.out / "data").exists():
        pack_faces(args.out / "data", clip)
    extractor = train_extractor()
    config = parse_config(
        {
            "run": str(args.out / "run"),
            "data": {"path": str(args.out / "data"), "num_threads": 0},
            "guide": {"name": "pixels"},
            "clip": {"path": str(args.out / "clip")},
            "family": {
                "name": "guided",
                "z_dim": 64,
                "channel_base": 768,
                "channel_max": 64,
                "grids": {"main": [32, 8]},
                "objectives": [
                    {"name": "mse", "normalize": True, "weight": 0.1},
                    {"name": "energy", "weight": 0.5},
                ],
                "reference_batch": 128,
                "text": {"embed_dim": tiny_clip.EMBED_DIM, "noise": 0.8, "dropout": 0.15},
            },
            "stages": [{"resolution": 32, "kimg": args.kimg, "batch": 48, "lr": 2e-3}],
            "ema": {"halflife_kimg": 1},
            "log": {"every_kimg": 4, "probe_kimg": 24, "samples_kimg": 24},
            "checkpoint": {"every_kimg": 24},
        },
        args.overrides,
    )
    began = time.process_time()
    (result,) = train(config)
    print(json.dumps({"cpu_seconds": round(time.process_time() - began)}))
    for guidance in (1.0, 1.5, 2.0):
        found = measure(config.run, clip, guidance, extractor)
        print(json.dumps({"guidance": guidance} | {k: round(v, 3) for k, v in found.items()}))
    unasked = {"diversity": result["diversity"]} | measure_unasked(config.run, extractor)
    print(json.dumps({"unasked": {k: round(v, 3) for k, v in unasked.items()}}))


if __name__ == "__main__":
    main()
