"""Checks of one GPU, for benchmarks/gpu.sh: each says what it measured, and whether that is right.

Trainings run in processes of their own, so that one that fails leaves the others alone. On a CPU,
or with --dry, networks and lengths are tiny, and what needs a GPU is skipped.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend
from train_steps.counts import DEFAULT_GPU, GPUS, gpu_called, total
from train_steps.data import GUIDE, config_with_data

from dinogen.config import dump_config, load_config
from dinogen.distributed import rng
from dinogen.runs.layout import STATS
from dinogen.training.checkpointing.checkpoint import newest_checkpoint

CONFIGS = (
    "dcgan_64",
    "guided_64",
    "vae_gan_64",
    "sagan_hinge_64",
    "stylegan2_ada_64",
    "ddpm_v_64",
    "guided_energy_d_64",
)
STEPS, BATCH = 20, 64
DRY_STEPS, DRY_BATCH = 4, 2
TINY_GUIDE = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "image_size": 56}
TINY = {  # what makes a family's networks narrow
    "dcgan": ["family.ngf=8", "family.ndf=8"],
    "ddpm": ["family.base_channels=32", "family.head_channels=32", "family.sample_steps=2"],
    "guided": ["family.channel_max=16", "family.probe_samples=4", "family.reference_batch=4"],
    "sagan": ["family.channels=8"],
    "stylegan2_ada": ["family.channel_max=16"],
    "vae_gan": ["family.base_channels=8", "family.d_channels=8"],
}
LIMIT = 300.0  # seconds of one training
PRELOADED = ["dinogen.training.run", "launch.cli.main", "transformers", "torch._dynamo"]


@dataclass
class Result:
    """What a check found.

    Attributes:
        name: of the check.
        status: ``ok``, ``FAILED`` or ``skipped``.
        measured: in words.
        seconds: it took.
    """

    name: str
    status: str
    measured: str
    seconds: float


class Skipped(Exception):
    """The check cannot be made here; the message says why."""


class Failed(Exception):
    """Something is not as it has to be; the message says what was measured."""


class Bench:
    """What the checks share: the folder, the sizes and the configs with their data."""

    def __init__(self, folder: Path, dry: bool, trace: Path | None) -> None:
        self.folder = folder
        self.dry = dry
        self.trace = trace
        self.device = torch.device("cpu" if dry else "cuda")
        self.steps, self.batch = (DRY_STEPS, DRY_BATCH) if dry else (STEPS, BATCH)
        self._files: dict[str, Path] = {}

    def config(self, name: str) -> Path:
        """A YAML of a config's last stage alone, with data, for a few steps."""
        if name in self._files:
            return self._files[name]
        folder = self.folder / name
        folder.mkdir()
        family = load_config(name).family.name
        kimg = self.steps * self.batch / 1000
        overrides = [f"device={self.device.type}", "engine.precision=auto", "log.num_samples=4"]
        overrides += [f"checkpoint.every_kimg={kimg / 2}", f"log.every_kimg={kimg / 2}"]
        overrides += ["log.probe_kimg=1000", "log.samples_kimg=1000"]
        overrides += TINY.get(family, []) if self.dry else []
        guide = TINY_GUIDE if self.dry else GUIDE
        config = config_with_data(name, folder, overrides, guide)
        stage = config.stages[-1]
        micro = config.engine.micro_batch
        shown = config.model_dump(mode="json")
        shown["stages"] = [
            stage.model_dump(mode="json")
            | {"kimg": kimg, "epochs": None, "batch": self.batch}
            | {"fade_kimg": 0, "warmup_kimg": 0, "decay_kimg": 0}
        ]
        shown["engine"]["micro_batch"] = None if micro is None else min(micro, self.batch)
        path = folder / "config.yaml"
        path.write_text(dump_config(type(config).model_validate(shown)), encoding="utf-8")
        self._files[name] = path
        return path

    def train(self, name: str, run: str, *overrides: str, dies_at: int = 0) -> dict[str, Any]:
        """Train a config in a process of its own; its result.json, with its log lines."""
        place = self.folder / "runs" / run
        arguments = (str(self.config(name)), [f"run={place}", *overrides], self.dry, dies_at)
        self.alone(_train, *arguments, killed=dies_at > 0)
        if dies_at:
            return {}
        (file,) = place.glob("[0-9]*x[0-9]*/result.json")
        lines = file.with_name(STATS).read_text().splitlines()
        return json.loads(file.read_text()) | {"lines": [json.loads(line) for line in lines]}

    def alone(self, function: Callable[..., Any], *arguments: Any, killed: bool = False) -> Any:
        """What a function returns in a process of its own, which has only imported until then."""
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        log, out = self.folder / "log", self.folder / "out.json"
        out.unlink(missing_ok=True)
        child = context.Process(target=_logged, args=(log, out, function, arguments))
        child.start()
        child.join(LIMIT)
        if child.exitcode is None:
            child.kill()
            raise Failed(f"not done after {LIMIT:.0f} s")
        if killed:
            return None
        if child.exitcode:
            raise Failed(f"exit code {child.exitcode}: {_tail(log)}")
        return json.loads(out.read_text())

    def weights(self, run: str) -> dict[str, Tensor]:
        """All tensors of a run's newest checkpoint."""
        (stage,) = (self.folder / "runs" / run).glob("[0-9]*x[0-9]*")
        checkpoint = newest_checkpoint(stage / "checkpoints")
        if checkpoint is None:
            raise Failed(f"run {run} left no checkpoint")
        names = [file.stem for file in sorted(checkpoint.folder.glob("*.safetensors"))]
        return {f"{n}/{k}": v for n in names for k, v in checkpoint.tensors(n).items()}


def doctor(bench: Bench) -> str:
    """The command ``dinogen doctor`` finds nothing broken."""
    command = [sys.executable, "-m", "launch.cli", "doctor", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = json.loads(done.stdout)
    words = ", ".join(f["name"] for f in found if f["status"] == "warn")
    if done.returncode:
        raise Failed(", ".join(f["name"] for f in found if f["status"] == "broken"))
    return f"{len(found)} findings, warnings: {words or 'none'}"


def philox(bench: Bench) -> str:
    """Random numbers are the same on the device: words bit for bit, floats to rounding."""
    furthest = bench.alone(_philox, bench.device.type)
    whole = furthest["words"] or furthest["integers"]
    if whole or furthest["uniform"] > 1e-6 or furthest["normal"] > 1e-4:
        raise Failed(f"largest differences {furthest}")
    return f"words equal, uniform {furthest['uniform']:.1e}, normal {furthest['normal']:.1e} apart"


def batch_norm(bench: Bench) -> str:
    """Batch norm over ranks, here one, is torch's own: output, gradients and running statistics."""
    apart = bench.alone(_batch_norm, bench.device.type)
    if apart > 1e-4:
        raise Failed(f"{apart:.1e} apart")
    return f"{apart:.1e} apart"


def attention(bench: Bench) -> str:
    """The kernel that attention of a U-Net and of a guide takes, in half precision."""
    if bench.dry:
        raise Skipped("needs a GPU")
    kernels = bench.alone(_attention)
    if slow := [shape for shape, kernel in kernels.items() if kernel == SDPBackend.MATH.name]:
        raise Failed(f"the math kernel for {', '.join(slow)}")
    return ", ".join(f"{shape}: {kernel}" for shape, kernel in kernels.items())


def trains(name: str) -> Callable[[Bench], str]:
    """A check that some steps of a config work, and do not take more and more memory."""

    def check(bench: Bench) -> str:
        result = bench.train(name, name)
        lines = result["lines"]
        if not lines or any(line.get("loss") is None for line in lines):
            raise Failed("the loss is not finite")
        told = f"{result['images_per_s']:.1f} images/s"
        peaks = [line["peak_memory_mb"] for line in lines if line.get("peak_memory_mb")]
        if not peaks:
            return told
        if peaks[-1] > 1.02 * peaks[0]:
            raise Failed(f"memory grows from {peaks[0]:.0f} to {peaks[-1]:.0f} MiB")
        return f"{told}, {peaks[-1]:.0f} MiB"

    check.__doc__ = f"Some steps of {name}, whose loss stays finite and whose memory does not grow."
    return check


def steps(name: str) -> Callable[[Bench], str]:
    """A check that a step of a config waits for nothing, and how near it is to the peak rate."""

    def check(bench: Bench) -> str:
        trace = None if bench.trace is None else str(bench.trace / name)
        found = bench.alone(_step, str(bench.config(name)), trace)
        told = f"{1000 * found['elapsed']:.2f} ms, {found['launches']:,} launches, "
        told += f"MFU {found['mfu']:.1%}, {found['peak'] / 2**20:.0f} MiB"
        waits = {**found["syncs"], **found["blocking"]}
        if waits:
            raise Failed(f"{told}; the host waits at {'; '.join(waits)}")
        return f"{told}, no waits"

    check.__doc__ = f"A step of {name}: no reads from the device, no blocking copies."
    return check


def repeats(bench: Bench) -> str:
    """Two runs with engine.deterministic have the same weights, bit for bit."""
    for run in ("first", "second"):
        bench.train("dcgan_64", run, "engine.deterministic=true")
    return _same(bench.weights("first"), bench.weights("second"))


def resumes(bench: Bench) -> str:
    """A run that was killed and started again has the weights of one that was not."""
    half = bench.steps * bench.batch // 2
    bench.train("dcgan_64", "killed", "engine.deterministic=true", dies_at=half)
    result = bench.train("dcgan_64", "killed", "engine.deterministic=true")
    if not (bench.folder / "runs" / "first").exists():
        bench.train("dcgan_64", "first", "engine.deterministic=true")
    equal = _same(bench.weights("first"), bench.weights("killed"))
    return f"{equal}, killed at {half} of {result['nimg']} images"


def compiles(bench: Bench) -> str:
    """engine.compile trains as without it, to rounding."""
    plain = bench.train("dcgan_64", "plain", "engine.precision=fp32")
    fast = bench.train("dcgan_64", "compiled", "engine.precision=fp32", "engine.compile=true")
    apart = _apart(bench.weights("plain"), bench.weights("compiled"))
    if apart > 0.05:
        raise Failed(f"weights {apart:.1e} apart")
    ratio = fast["images_per_s"] / plain["images_per_s"]
    return f"weights {apart:.1e} apart, {ratio:.2f} of the speed, compiling included"


def under_torchrun(name: str, *overrides: str) -> Callable[[Bench], str]:
    """A check that an engine works on one rank that torchrun starts."""

    def check(bench: Bench) -> str:
        if name == "deepspeed" and shutil.which("deepspeed", path=_beside()) is None:
            raise Skipped("deepspeed is not installed")
        run = bench.folder / "runs" / f"torchrun-{name}"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", "1", "-m", "launch.cli", "train"]
        command += [str(bench.config("dcgan_64")), f"run={run}", f"engine.name={name}", *overrides]
        command.append("engine.precision=fp32")
        log = bench.folder / "log"
        with log.open("w") as file:
            done = subprocess.run(command, stdout=file, stderr=file, timeout=LIMIT, check=False)
        if done.returncode:
            raise Failed(f"exit code {done.returncode}: {_tail(log)}")
        if not (bench.folder / "runs" / "plain").exists():
            bench.train("dcgan_64", "plain", "engine.precision=fp32")
        mine = {k: v for k, v in bench.weights(run.name).items() if not k.startswith("optim/")}
        apart = _apart(bench.weights("plain"), mine)
        if apart > 0.05:
            raise Failed(f"weights {apart:.1e} apart from those of one process")
        return f"weights {apart:.1e} apart from those of one process"

    check.__doc__ = f"engine.name={name} on one rank under torchrun."
    return check


def all_checks(dry: bool) -> dict[str, Callable[[Bench], str]]:
    """Checks by their names, in their order."""
    found: dict[str, Callable[[Bench], str]] = {
        "doctor": doctor,
        "philox": philox,
        "batch norm": batch_norm,
        "attention": attention,
    }
    found |= {f"train {name}": trains(name) for name in CONFIGS}
    found |= {f"step {name}": steps(name) for name in CONFIGS[: 1 if dry else None]}
    found |= {"deterministic": repeats, "kill and resume": resumes, "compile": compiles}
    found |= {"ddp": under_torchrun("ddp")}
    found |= {"deepspeed, ZeRO 1": under_torchrun("deepspeed", "engine.zero=1")}
    return found


def main() -> None:
    """Make all checks and print a table; ends with 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--dry", action="store_true", help="tiny sizes on a CPU")
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument("--trace", type=Path, help="folder for traces of single steps")
    parser.add_argument("--only", default="", help="checks whose name holds this")
    options = parser.parse_args()
    dry = options.dry or not torch.cuda.is_available()
    name = "a CPU, tiny sizes" if dry else torch.cuda.get_device_name()
    os.environ.setdefault("OMP_NUM_THREADS", "1" if dry else "4")
    os.environ["PYTHONSAFEPATH"] = "1"  # processes find dinogen by PYTHONPATH, not where we are
    began = time.monotonic()
    print(f"torch {torch.__version__} on {name}", flush=True)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), dry, options.trace)
        for title, check in all_checks(dry).items():
            if options.only in title:
                results.append(made(title, check, bench))
    print(f"\n{'check':26}{'':9}{'seconds':>8}  measured")
    for result in results:
        measured = result.measured.splitlines()[-1] if result.measured else ""
        print(f"{result.name:26}{result.status:9}{result.seconds:8.1f}  {measured}")
    print(f"{time.monotonic() - began:.0f} s on {name}")
    if options.json is not None:
        facts = {"device": name, "torch": torch.__version__, "cuda": torch.version.cuda}
        options.json.write_text(
            json.dumps(facts | {"checks": [asdict(r) for r in results]}, indent=1) + "\n"
        )
    sys.exit(any(result.status == "FAILED" for result in results))


def made(title: str, check: Callable[[Bench], str], bench: Bench) -> Result:
    """The result of a check, whatever becomes of it."""
    began = time.monotonic()
    try:
        status, measured = "ok", check(bench)
    except Skipped as reason:
        status, measured = "skipped", str(reason)
    except Failed as reason:
        status, measured = "FAILED", str(reason)
    except Exception:
        status, measured = "FAILED", traceback.format_exc()
    seconds = time.monotonic() - began
    print(f"{title}: {status} ({seconds:.1f} s) {measured}", flush=True)
    return Result(title, status, measured, seconds)


def _logged(log: Path, out: Path, function: Callable[..., Any], arguments: Sequence[Any]) -> None:
    """In a child: call a function with all it prints in a file, and write what it returns."""
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    out.write_text(json.dumps(function(*arguments)))


def _train(config: str, overrides: list[str], dry: bool, dies_at: int) -> None:
    from dinogen.training.engines import base
    from dinogen.training.run import train
    from launch.cli.console import setup_logging

    if dry:
        base.COMPILER = "aot_eager"  # compiling takes minutes on a CPU
    setup_logging()
    settings = load_config(Path(config), overrides)
    if dies_at:
        _die_at(settings.run, dies_at)
    train(settings)


def _die_at(run: Path, nimg: int) -> None:
    """Be killed as soon as a checkpoint of ``nimg`` images is there."""
    import signal
    import threading

    def kill() -> None:
        while not any(int(p.name) >= nimg for p in run.glob("[0-9]*x[0-9]*/checkpoints/[0-9]*")):
            time.sleep(0.002)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=kill, daemon=True).start()


def _philox(device: str) -> dict[str, float]:
    positions = torch.tensor([0, 1, 2**31, 2**40 + 7, 12345])
    key = rng.derive(7, "gpu")
    draws: dict[str, Callable[[Tensor], Tensor]] = {
        "words": lambda p: torch.stack(rng.philox((p, p * 0, p & 0xFFFFFFFF, p >> 32), key)),
        "integers": lambda p: rng.integers(7, "gpu", p, (1000,), high=2**31),
        "uniform": lambda p: rng.uniform(7, "gpu", p, (1000,)),
        "normal": lambda p: rng.normal(7, "gpu", p, (1000,)),
    }
    return {
        name: float((draw(positions) - draw(positions.to(device)).cpu()).abs().max())
        for name, draw in draws.items()
    }


def _batch_norm(device: str) -> float:
    from dinogen.training.engines.batch_norm import sync_batch_norms

    torch.manual_seed(0)
    found = []
    for over_ranks in (False, True):
        norm = torch.nn.Sequential(torch.nn.BatchNorm2d(7)).to(device)
        if over_ranks:
            sync_batch_norms(norm)
        x = torch.linspace(-1, 3, 5 * 7 * 9, device=device).reshape(5, 7, 3, 3).requires_grad_()
        y = norm(x)
        (y * torch.sin(5 * x.detach())).sum().backward()
        found.append([y, x.grad, *(p.grad for p in norm.parameters()), *norm.buffers()])
    pairs = zip(*found, strict=True)
    return max(float((one - other).detach().abs().max()) for one, other in pairs)


def _attention() -> dict[str, str]:
    shapes = {"U-Net, 16x16": (64, 4, 256, 64), "DINOv2-small": (64, 6, 257, 64)}
    found = {}
    for name, shape in shapes.items():
        q = torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        F.scaled_dot_product_attention(q, q, q).sum().backward()
        found[name] = SDPBackend(torch._fused_sdp_choice(q, q, q)).name
    return found


def _step(config: str, trace: str | None) -> dict[str, Any]:
    from train_steps.measured import measure

    gpu = DEFAULT_GPU
    if torch.cuda.is_available():
        gpu = gpu_called(torch.cuda.get_device_name()) or gpu
    settings = load_config(Path(config))
    folder = None if trace is None else Path(trace)
    ((parts, elapsed),) = measure(settings, -1, [1], GPUS[gpu], folder)
    whole = total(parts.values())
    return whole.to_dict() | {"elapsed": elapsed, "mfu": whole.at_peak / elapsed}


def _same(left: dict[str, Tensor], right: dict[str, Tensor]) -> str:
    """Words for two sets of weights that are equal.

    Raises:
        Failed: they are not.
    """
    if left.keys() != right.keys():
        raise Failed("other tensors")
    differ = [name for name, value in left.items() if not torch.equal(value, right[name])]
    if differ:
        raise Failed(f"{len(differ)} of {len(left)} tensors differ, by {_apart(left, right):.1e}")
    return f"{len(left)} tensors equal"


def _apart(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    """Largest difference of any two weights, over the largest weight."""
    floats = [name for name in right if left[name].is_floating_point() and left[name].numel()]
    apart = max(float((left[name] - right[name]).abs().max()) for name in floats)
    return apart / max(float(left[name].abs().max()) for name in floats)


def _tail(log: Path) -> str:
    return " ".join(log.read_text(errors="replace").split())[-600:]


def _beside() -> str:
    """Where commands of this Python's packages are."""
    return f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}"


if __name__ == "__main__":
    main()
