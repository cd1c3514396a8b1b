"""CPU seconds of training steps: of two checkouts in turn, and of the loop over a bare one.

    python benchmarks/cpu_seconds.py pair --before CHECKOUT [CONFIG...] [--set KEY=VALUE ...]
    python benchmarks/cpu_seconds.py loop

``pair`` runs steps of shipped configs in two processes, one of each checkout, that take turns, so
that whatever else the machine does slows both down. It prints the median CPU seconds of each phase
and the median ratio of a round. Samples are random; a step costs the same whatever they show.

``loop`` runs dcgan_fast by the trainer, and by as few lines of torch as compute the same: same
networks, losses, flips, average and optimizer, latents from torch's own generator; once as it is,
and once with the allocator set as the trainer sets it. Each runs in a process of its own.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image

REPO = Path(__file__).parents[1]
CONFIGS = {
    # path length and mixing are left out at 32x32 otherwise
    "stylegan2_ada_fast": ["family.path_weight=2", "family.style_mixing=0.9"],
    "ddpm_v_fast": [],
    "dcgan_fast": [],
    "guided_drift_fast": [],
}
PLAIN = "bare loop"
NUM_STEPS = 5  # per round of a loop
NUM_SAMPLES = 256
SIDE = 32


def main() -> None:
    """Run one of the two measurements."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    pair = commands.add_parser("pair")
    pair.add_argument("configs", nargs="*", default=list(CONFIGS))
    pair.add_argument("--before", type=Path, required=True)
    pair.add_argument("--set", nargs="*", default=[], dest="changes")
    pair.add_argument("--rounds", type=int, default=12)
    loop = commands.add_parser("loop")
    loop.add_argument("--rounds", type=int, default=60)
    worker = commands.add_parser("worker")
    worker.add_argument("config")
    worker.add_argument("data", type=Path)
    worker.add_argument("changes", nargs="*")
    worker.add_argument("--loop")
    options = parser.parse_args()
    if options.command == "pair":
        compare_checkouts(options)
    elif options.command == "loop":
        compare_loops(options)
    elif options.loop:
        serve_loop(options)
    else:
        serve(options)


def compare_checkouts(options: argparse.Namespace) -> None:
    """Let two workers take turns, config by config."""
    print(f"{'config':<22}{'phase':<8}{'before, ms':>12}{'after, ms':>12}{'after / before':>16}")
    for name in options.configs:
        with tempfile.TemporaryDirectory() as folder:
            pack_random(name, Path(folder) / "data")
            changes = [*CONFIGS.get(name, []), *options.changes]
            trees = [options.before.resolve(), REPO]
            workers = [start(tree, name, Path(folder) / "data", changes) for tree in trees]
            rounds: list[list[dict[str, float]]] = [[], []]
            for number in range(options.rounds):
                for which in (0, 1) if number % 2 else (1, 0):
                    rounds[which].append(ask(workers[which]))
            for worker in workers:
                worker.communicate()
        for phase in rounds[0][0]:
            before, after = ([found[phase] for found in side] for side in rounds)
            print(
                f"{name:<22}{phase:<8}{median(before) * 1e3:>12.1f}{median(after) * 1e3:>12.1f}"
                f"{ratio(after, before):>16.3f}",
                flush=True,
            )


def ratio(one: list[float], other: list[float]) -> float:
    """Median over rounds, in each of which both took their turn."""
    return median(a / b for a, b in zip(one, other, strict=True))


def start(tree: Path, name: str, data: Path, changes: list[str]) -> subprocess.Popen[str]:
    """A worker of a checkout, which waits to be asked."""
    env = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__).resolve()), "worker", name, str(data), *changes]
    return subprocess.Popen(
        command, cwd=tree, env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )


def ask(worker: subprocess.Popen[str]) -> dict[str, float]:
    """CPU seconds by phase of the next round: a step with all phases and one with the usual."""
    assert worker.stdin is not None
    assert worker.stdout is not None
    worker.stdin.write("\n")
    worker.stdin.flush()
    found: dict[str, float] = json.loads(worker.stdout.readline())
    return found


def serve(options: argparse.Namespace) -> None:
    """Of this checkout: run two steps for each line read, and print what they cost."""
    state, batch = ready(options.config, options.data, options.changes)
    spent: defaultdict[str, float] = defaultdict(float)
    trainer = timed(state, spent)
    for _ in sys.stdin:
        spent.clear()
        for number in (0, 1):
            state.progress.step = number
            began = time.process_time()
            trainer.train_step(dict(batch))
            spent["step" if number else "all"] = time.process_time() - began
        print(json.dumps(spent), flush=True)


def ready(name: str, data: Path, changes: list[str]) -> tuple[Any, Any]:
    """The state of a stage, and a batch for its steps."""
    from dinogen.config import load_config, with_lengths
    from dinogen.families.registry import resolve
    from dinogen.training.state import StageState

    torch.set_num_threads(1)
    base = [f"data.path={data}", f"run={data.parent}/run", *changes]
    config = resolve(load_config(REPO / "configs" / f"{name}.yaml", base))
    config = with_lengths(config, NUM_SAMPLES)
    state = StageState(config, 0)
    inputs = state.family.inputs
    num = state.stage.batch
    batch = state.data.read(list(range(num)), image_size=inputs.image_size, levels=inputs.levels)
    batch["position"] = torch.arange(num)
    return state, batch


def timed(state: Any, spent: dict[str, float]) -> Any:
    """A trainer that adds up the CPU seconds of each phase."""
    from dinogen.training.stop import StopFlag
    from dinogen.training.trainer import Trainer, Window

    trainer = Trainer(state, StopFlag())
    trainer.window = Window(time.monotonic())
    trainer._prepare_engine()
    engine = trainer.engine
    losses, step = engine.losses, engine.step
    began: dict[str, float] = {}

    def begin(phase: Any, *arguments: Any, **named: Any) -> Any:
        began.setdefault(phase.name, time.process_time())
        return losses(phase, *arguments, **named)

    def end(phase: Any) -> Any:
        found = step(phase)
        spent[phase.name] = time.process_time() - began.pop(phase.name)
        return found

    engine.losses, engine.step = begin, end  # type: ignore[method-assign]
    return trainer


def pack_random(name: str, folder: Path) -> None:
    """Images of noise, and features of noise with the channels of the config's guides."""
    from dinogen.config import load_config
    from dinogen.features.load import load_guide
    from shards.format.sample import Sample
    from shards.write.shard_writer import pack

    config = load_config(REPO / "configs" / f"{name}.yaml", [])
    guided = config.family.name == "guided"
    chosen = {"": config.guide, **config.guides} if guided else {}
    guides = {key: load_guide(guide, torch.device("cpu")).info for key, guide in chosen.items()}
    grids = config.prepare.pyramids.grids
    rng = np.random.default_rng(0)
    samples = []
    for number in range(NUM_SAMPLES):
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 255, (SIDE, SIDE, 3), np.uint8)).save(file, "PNG")
        levels = {
            f"{key}.p{grid}".lstrip("."): rng.standard_normal((grid**2, info.num_channels))
            for key, info in guides.items()
            for grid in grids
        }
        arrays = {level: values.astype(np.float16) for level, values in levels.items()}
        samples.append(Sample(f"noise{number:04d}", file.getvalue(), "png", {}, arrays))
    main_guide = guides.pop("").to_dict() if guides else None
    others = {key: info.to_dict() for key, info in guides.items()}
    pack(samples, folder, shard_size=128, guide=main_guide, guides=others)


def compare_loops(options: argparse.Namespace) -> None:
    """Let the trainer and the bare loops take turns."""
    with tempfile.TemporaryDirectory() as folder:
        pack_random("dcgan_fast", Path(folder) / "data")
        workers = {
            loop: start(REPO, "dcgan_fast", Path(folder) / "data", ["--loop", loop])
            for loop in ("trainer", PLAIN, "bare loop, same allocator")
        }
        found: dict[str, list[float]] = {name: [] for name in workers}
        for number in range(options.rounds):
            for name in sorted(workers, reverse=bool(number % 2)):
                found[name].append(ask(workers[name])["step"])
        for worker in workers.values():
            worker.communicate()
    print(f"{'':<28}{'CPU per step, ms':>18}{'trainer / this':>18}")
    for name, seconds in found.items():
        share = ratio(found["trainer"], seconds)
        print(f"{name:<28}{median(seconds) * 1e3:>18.2f}{share:>18.3f}")


def serve_loop(options: argparse.Namespace) -> None:
    """For each line read run five steps of a loop, and print what one cost."""
    from dinogen.training.engines import base

    if options.loop == PLAIN:
        base.keep_freed_memory = lambda: False
    state, batch = ready("dcgan_fast", options.data, [])
    if options.loop == "trainer":
        trainer = timed(state, {})

        def step() -> None:
            trainer.train_step(dict(batch))
    else:
        step = bare_loop(state, batch["image"])
    for _ in sys.stdin:
        began = time.process_time()
        for _ in range(NUM_STEPS):
            step()
        print(json.dumps({"step": (time.process_time() - began) / NUM_STEPS}), flush=True)


def bare_loop(state: Any, images: torch.Tensor) -> Callable[[], None]:
    """A step of DCGAN as one would write it for this one purpose."""
    import copy

    from dinogen.losses.adversarial import bce_d, bce_g

    G, D = (copy.deepcopy(state.family.networks[name]) for name in ("G", "D"))
    ema = copy.deepcopy(G).eval()
    stage, betas = state.stage, tuple(state.config.optim.betas)
    optimizers = [
        torch.optim.Adam(network.parameters(), stage.lr, betas, fused=True) for network in (G, D)
    ]
    z_dim = state.family.options.z_dim

    def step() -> None:
        flipped = torch.rand(len(images), 1, 1, 1) < 0.5
        real = torch.where(flipped, images.flip(3), images)
        with torch.no_grad():
            fake = G(torch.randn(len(images), z_dim))
        bce_d(D(real), D(fake)).backward()
        optimizers[1].step()
        optimizers[1].zero_grad()
        D.requires_grad_(False)
        bce_g(D(G(torch.randn(len(images), z_dim)))).backward()
        D.requires_grad_(True)
        optimizers[0].step()
        optimizers[0].zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(list(ema.parameters()), list(G.parameters()), 0.01)
            for mine, its in zip(ema.buffers(), G.buffers(), strict=True):
                mine.copy_(its)

    return step


if __name__ == "__main__":
    main()
