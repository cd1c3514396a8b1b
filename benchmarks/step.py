"""Whole train steps of configs: launches, waits, copies, FLOPs, bytes, memory, time of each part.

    python benchmarks/step.py dcgan_64 stylegan2_ada_64
    python benchmarks/step.py ddpm_v_64 --set engine.precision=bf16 stages.0.batch=64 --steps 1 -v
    python benchmarks/step.py dcgan_64 --ranks 2            as rank 0 of two under ddp
    python benchmarks/step.py dcgan_64 --tree ../before     ratios to another checkout
    python benchmarks/step.py dcgan_64 --trace traces       on a GPU, with a trace for TensorBoard

Configs are names of shipped ones, or files. Their data are packed from noise, their guide has
random weights, and steps are those of the trainer, with batches of its dataloader. One step is made
before those that are counted. Lazy regularisers are due at step 0 and not at step 1.

Where torch has no GPU, the host computes with CPU tensors, and the device has CUDA tensors without
values. Then launches are counted as one per operator that is no view, and the time is that of a
model, not a measurement: per kernel the longest of its FLOPs at the peak rate of --gpu, its bytes
at the bandwidth, and 2 us. It leaves out what the host takes, so MFU is a ceiling.

`syncs` hold the host until the device has done what this step queued, `waits` are for events of
earlier steps, `blocking` are copies to the device from memory that is not pinned, and `copies` are
asynchronous. -v names the line of each.

On a GPU, launches and kernel times are those of torch.profiler, syncs are what torch's sync debug
mode reports, and peak memory is that of the allocator.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
import traceback
import warnings
from pathlib import Path
from typing import Any

from fake_cuda import guard
from train_steps.counts import DEFAULT_GPU, GPUS, Counts, gpu_called, total

ROOT = Path(__file__).resolve().parents[1]
COLUMNS = ("launches", "syncs", "waits", "blocking", "copies", "TFLOP", "GB", "GiB", "ms", "MFU")
COMPARED = ("launches", "num_syncs", "num_blocking", "flops", "moved", "peak", "seconds")


def main() -> None:
    """Run the steps and print tables; ends with 1 if a config failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("configs", nargs="+", metavar="CONFIG")
    parser.add_argument("--set", nargs="*", default=[], action="extend", metavar="KEY=VALUE")
    parser.add_argument("--steps", nargs="*", type=int, default=[0, 1], help="default: 0 1")
    parser.add_argument("--stage", type=int, default=-1, help="number of the stage; the last")
    parser.add_argument("--ranks", type=int, default=1, help="as rank 0 of them; without a GPU")
    parser.add_argument("--gpu", choices=GPUS, default=DEFAULT_GPU, help="that is modelled")
    parser.add_argument("--tree", type=Path, help="a checkout of the project to compare with")
    parser.add_argument("--trace", type=Path, help="folder for traces; with a GPU")
    parser.add_argument("--json", type=Path, help="file for all numbers")
    parser.add_argument("-v", "--verbose", action="store_true", help="name lines")
    options = parser.parse_args()
    if options.tree is None:
        found = run(options)
        if options.json is not None:
            options.json.write_text(json.dumps(found, indent=1) + "\n")
    else:
        found = compare(options)
    failed = [name for name, config in found["configs"].items() if "error" in config]
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Run the steps of every config in this process; what was found, JSON-ready."""
    real = guard.gpu_found()
    try:
        if not real:
            guard.load()
    except guard.NoGuardError as error:
        sys.exit(f"step.py: {error}")
    # Whatever imports torch comes after the guard.
    import torch

    logging.disable(logging.CRITICAL)
    warnings.filterwarnings("ignore")
    name = options.gpu
    if real:
        name = gpu_called(torch.cuda.get_device_name()) or name
    else:
        from fake_cuda import device

        device.install()
        torch.set_num_threads(1)  # tensors of the host are small
    if options.ranks > 1:
        if real:
            sys.exit("step.py: --ranks pretends that there are others, which takes fake tensors")
        from train_steps.ranks import pretend

        pretend(options.ranks)
    from train_steps.runner import ROOT as TREE

    what = f"measured on {torch.cuda.get_device_name()}" if real else f"a model of {name}"
    print(f"{TREE}, torch {torch.__version__}; times are {what}", flush=True)
    found: dict[str, Any] = {"tree": str(TREE), "torch": torch.__version__, "measured": real}
    found |= {"gpu": name, "ranks": options.ranks, "configs": {}}
    for config in options.configs:
        try:
            found["configs"][config] = run_config(config, options, real, name)
        except Exception as error:
            found["configs"][config] = {"error": f"{type(error).__name__}: {error}"}
            print(f"\n{config}: FAILED\n{traceback.format_exc()[-4000:]}", flush=True)
    return found


def run_config(name: str, options: argparse.Namespace, real: bool, gpu: str) -> dict[str, Any]:
    """Run the steps of one config and print their tables."""
    from train_steps.data import config_with_data

    with tempfile.TemporaryDirectory() as folder:
        config = config_with_data(name, Path(folder), options.set)
        stage = config.stages[options.stage]
        print(f"\n{name}: {stage.resolution}x{stage.resolution}, batch {stage.batch}", flush=True)
        asked = (config, options.stage, options.steps, GPUS[gpu])
        steps: dict[str, Any] = {}
        if real:
            from train_steps.measured import measure

            trace = None if options.trace is None else options.trace / Path(name).stem
            for number, (parts, seconds) in zip(options.steps, measure(*asked, trace), strict=True):
                steps[str(number)] = shown(number, parts, options.verbose) | {"elapsed": seconds}
                busy = total(parts.values())
                share = busy.at_peak / seconds
                print(f"  {1000 * seconds:.2f} ms by the clock, MFU {share:.1%}", flush=True)
        else:
            from train_steps.counted import count

            for number, parts in zip(options.steps, count(*asked, options.verbose), strict=True):
                steps[str(number)] = shown(number, parts, options.verbose)
    return {"batch": stage.batch, "resolution": stage.resolution, "steps": steps}


def shown(number: int, parts: dict[str, Counts], verbose: bool) -> dict[str, Any]:
    """Print the table of a step; its numbers, JSON-ready."""
    print(f"  {f'step {number}':22}{''.join(f'{name:>10}' for name in COLUMNS)}")
    rows = {name: counts for name, counts in parts.items() if counts.launches or counts.flops}
    whole = total(parts.values())
    for name, counts in {**rows, "all": whole}.items():
        print(f"  {name:22}{row(counts)}")
    for title, lines in (
        ("sync", whole.syncs),
        ("wait for an event", whole.waits),
        ("blocking copy", whole.blocking),
        ("asynchronous copy", whole.copies),
        ("launches", whole.launched),
    ):
        for line, times in lines.most_common(40 if verbose else 0):
            print(f"    {title} {times} x {line}")
    sys.stdout.flush()
    return {
        "all": whole.to_dict(),
        "parts": {name: counts.to_dict() for name, counts in rows.items()},
    }


def row(counts: Counts) -> str:
    """Numbers of a part under :data:`COLUMNS`."""
    numbers = [counts.launches, counts.syncs.total(), counts.waits.total()]
    numbers += [counts.blocking.total(), counts.copies.total()]
    return (
        "".join(f"{number:10,}" for number in numbers)
        + f"{counts.flops / 1e12:10.3f}{counts.moved / 1e9:10.2f}{counts.peak / 2**30:10.2f}"
        + f"{1000 * counts.seconds:10.2f}{counts.mfu:10.1%}"
    )


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Run this checkout and another one, each in a process of its own, and print ratios."""
    trees = {"before": options.tree.resolve(), "after": ROOT}
    if not (trees["before"] / "dinogen").is_dir():
        sys.exit(f"step.py: --tree: {options.tree} is not a checkout of dinogen")
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, tree in trees.items():
            out = Path(folder) / f"{name}.json"
            command = [sys.executable, str(Path(__file__).resolve()), *options.configs]
            command += ["--steps", *map(str, options.steps), "--stage", str(options.stage)]
            command += ["--ranks", str(options.ranks), "--gpu", options.gpu, "--json", str(out)]
            command += ["--set", *options.set] if options.set else []
            command += ["-v"] if options.verbose else []
            subprocess.run(command, env=os.environ | {"PYTHONPATH": str(tree)}, check=False)
            if not out.exists():
                sys.exit(f"step.py: {tree} could not be measured")
            found[name] = json.loads(out.read_text())
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    print(f"\nbefore: {trees['before']}\nafter, and after / before in brackets:")
    print(f"{'':30}{''.join(f'{name:>20}' for name in COMPARED)}")
    before, after = (found[name]["configs"] for name in trees)
    for config in options.configs:
        if "error" in before[config] or "error" in after[config]:
            print(f"{config:30}failed")
            continue
        for number, step in after[config]["steps"].items():
            old, new = before[config]["steps"][number]["all"], step["all"]
            cells = [f"{_short(new[n])} ({_ratio(new[n], old[n])})" for n in COMPARED]
            print(f"{f'{config} step {number}':30}{''.join(f'{cell:>20}' for cell in cells)}")
    return {"configs": {name: before[name] | after[name] for name in options.configs}}


def _short(number: float) -> str:
    return f"{number:,}" if isinstance(number, int) and number < 1e7 else f"{number:.3g}"


def _ratio(new: float, old: float) -> str:
    return f"{new / old:.2f}" if old else "-"


if __name__ == "__main__":
    main()
