"""Checks this machine: what dinogen finds here, and what to do about what is missing."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

Status = Literal["ok", "note", "warn", "broken"]

LOW_DISK_GB = 20
INSTALL = "run `make install`"


@dataclass(frozen=True)
class Finding:
    """One line of the doctor.

    Attributes:
        name: what was checked.
        status: ``note`` is fine as it is; ``warn`` costs something; ``broken`` stops dinogen.
        found: what is here.
        remedy: what to do about it; empty if nothing has to be done.
    """

    name: str
    status: Status
    found: str
    remedy: str = ""

    def to_dict(self) -> dict[str, str]:
        """As a JSON-ready mapping."""
        return asdict(self)


def examine() -> Iterator[Finding]:
    """Run all checks, yielding each finding as soon as it is known."""
    for name, check in CHECKS.items():
        try:
            yield check()
        except Exception as error:  # a check that fails is a finding too, the others still run
            yield Finding(name, "broken", f"{type(error).__name__}: {error}", INSTALL)


def check_python() -> Finding:
    """The interpreter and where it is installed."""
    version = ".".join(map(str, sys.version_info[:3]))
    return Finding("Python", "ok", f"{version} at {sys.prefix}")


def check_packages() -> Finding:
    """Every package that dinogen requires is installed."""
    required = [re.split(r"[^\w.-]", line, maxsplit=1)[0] for line in required_packages()]
    missing = [name for name in required if not _version(name)]
    if missing:
        return Finding("packages", "broken", f"not installed: {', '.join(missing)}", INSTALL)
    return Finding("packages", "ok", f"all {len(required)} required packages are installed")


def required_packages() -> list[str]:
    """Requirement lines of dinogen itself, without extras."""
    return [line for line in metadata.requires("dinogen") or [] if "extra ==" not in line]


def check_torch() -> Finding:
    """Which build of torch."""
    import torch

    build = "CPU build"
    if torch.version.cuda:
        build = f"CUDA {torch.version.cuda} build"
    elif torch.version.hip:
        build = f"ROCm {torch.version.hip} build"
    return Finding("torch", "ok", f"{torch.__version__}, {build}")


def check_gpus() -> Finding:
    """GPUs that torch can use."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count:
        names = []
        for index in range(count):
            properties = torch.cuda.get_device_properties(index)
            names.append(f"{properties.name} {properties.total_memory / 2**30:.0f} GiB")
        remedy = f"to use all: dinogen launch CONFIG --gpus {count}"
        return Finding("GPUs", "ok", f"{count}: {', '.join(names)}", remedy if count > 1 else "")
    if shutil.which("nvidia-smi"):
        return Finding(
            "GPUs",
            "warn",
            "nvidia-smi exists, but torch sees no GPU",
            "install a CUDA build of torch that fits the driver shown by `nvidia-smi`, "
            "and check CUDA_VISIBLE_DEVICES",
        )
    return Finding(
        "GPUs", "note", "none", "training runs on the CPU: fine for the demo, slow above 16x16"
    )


def check_attention() -> Finding:
    """Which kernels torch may take for attention."""
    import torch
    from torch.backends import cuda

    kernels = {"flash": cuda.flash_sdp_enabled(), "math": cuda.math_sdp_enabled()}
    if torch.cuda.is_available():
        kernels["memory-efficient"] = cuda.mem_efficient_sdp_enabled()
        kernels["cuDNN"] = cuda.cudnn_sdp_enabled()
    on = [name for name, enabled in kernels.items() if enabled]
    found = f"kernels: {', '.join(on) or 'none'}"
    if not {"flash", "memory-efficient"}.intersection(on):
        remedy = "fused kernels are faster: find what calls torch.backends.cuda.enable_flash_sdp"
        return Finding("attention", "warn", found, remedy)
    return Finding("attention", "ok", found)


def check_arithmetic() -> Finding:
    """Which short formats a GPU multiplies fast, or which instructions a CPU has; libraries."""
    import torch

    if torch.cuda.is_available():
        # of Ampere and later; before, bfloat16 is emulated, and slow
        tf32 = torch.cuda.get_device_capability()[0] >= 8
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        words = f"TF32 {_yes(tf32)}, bf16 {_yes(bf16)}, cuDNN {_cudnn_version()}"
        if tf32 and bf16:
            return Finding("arithmetic", "ok", words)
        remedy = "engine.precision=auto takes fp16 here, which is the fastest"
        return Finding("arithmetic", "note", words, remedy)
    from dinogen.training.engines.base import keep_freed_memory

    level = torch.backends.cpu.get_cpu_capability()
    mkldnn = torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled
    words = f"{level}, oneDNN {'on' if mkldnn else 'off'}"
    words += f", memory kept between steps: {_yes(keep_freed_memory())}"
    if mkldnn and level not in ("DEFAULT", "NO AVX"):
        return Finding("arithmetic", "ok", words)
    remedy = "convolutions are slow: install another build of torch"
    return Finding("arithmetic", "warn", words, remedy)


def check_optimizer() -> Finding:
    """Whether Adam updates all weights in one kernel."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        weights = torch.nn.Parameter(torch.zeros(4, device=device))
        weights.grad = torch.ones_like(weights)
        torch.optim.Adam([weights], fused=True).step()
    except RuntimeError as error:
        return Finding("fused Adam", "warn", f"no: {error}", "updates take more kernels: no harm")
    return Finding("fused Adam", "ok", f"yes, on {device}")


def check_compiler() -> Finding:
    """What engine.compile needs: Triton on a GPU, a C++ compiler on a CPU."""
    import torch

    if torch.cuda.is_available():
        version = _version("triton")
        if version:
            return Finding("compiler", "ok", f"Triton {version}, for engine.compile")
        remedy = "only for engine.compile: pip install triton"
        return Finding("compiler", "note", "no Triton", remedy)
    name = os.environ.get("CXX") or "g++"
    path = shutil.which(name) or shutil.which("clang++")
    if path:
        return Finding("compiler", "ok", f"{path}, for engine.compile")
    remedy = "only for engine.compile: install g++, or set CXX"
    return Finding("compiler", "note", f"no {name}", remedy)


def check_pinned_memory() -> Finding:
    """Whether batches can be copied to a GPU while it computes."""
    import torch

    if not torch.cuda.is_available():
        return Finding("pinned memory", "note", "not used", "only copies to a GPU need it")
    try:
        pinned = torch.empty(1 << 20, dtype=torch.uint8, pin_memory=True).is_pinned()
        found = "" if pinned else "the memory is not pinned"
    except RuntimeError as error:
        found = str(error)
    if found:
        remedy = "copies to the GPU wait: raise the limit of locked memory (ulimit -l)"
        return Finding("pinned memory", "warn", found, remedy)
    return Finding("pinned memory", "ok", "yes")


def _cudnn_version() -> str:
    import torch

    version = torch.backends.cudnn.version()
    if version is None:
        return "none"
    # 90100 since version 9, 8902 before
    major, minor = divmod(version, 10000) if version >= 90000 else divmod(version, 1000)
    return f"{major}.{minor // 100}.{minor % 100}"


def _yes(here: bool) -> str:
    return "yes" if here else "no"


def check_collectives() -> Finding:
    """Backends for training in several processes."""
    import torch
    import torch.distributed as dist

    backends = [
        name
        for name, here in (
            ("nccl", dist.is_available() and dist.is_nccl_available()),
            ("gloo", dist.is_available() and dist.is_gloo_available()),
        )
        if here
    ]
    found = ", ".join(backends) or "none"
    if not backends:
        return Finding(
            "collectives", "warn", found, "one process only: install another torch build"
        )
    if torch.cuda.is_available() and "nccl" not in backends:
        return Finding("collectives", "warn", found, "several GPUs need NCCL: install a CUDA build")
    return Finding("collectives", "ok", found)


def check_deepspeed() -> Finding:
    """DeepSpeed's version, without importing it, which takes seconds."""
    version = _version("deepspeed")
    if version:
        return Finding("DeepSpeed", "ok", version)
    return Finding(
        "DeepSpeed",
        "note",
        "not installed",
        "only for ZeRO: pip install -c constraints.txt -e '.[deepspeed]'",
    )


def check_turbojpeg() -> Finding:
    """TurboJPEG, with an image that is encoded and decoded."""
    import numpy as np
    import simplejpeg

    grey = np.full((16, 16, 3), 128, np.uint8)
    again = simplejpeg.decode_jpeg(simplejpeg.encode_jpeg(grey, quality=95))
    if int(np.abs(again.astype(int) - 128).max()) > 2:
        return Finding("TurboJPEG", "broken", "a decoded image differs from the original", INSTALL)
    return Finding("TurboJPEG", "ok", f"simplejpeg {_version('simplejpeg')}")


def check_torchvision() -> Finding:
    """torchvision, which on some machines was built for another torch."""
    from dinogen._torchvision import ensure_torchvision

    ensure_torchvision()
    import torchvision
    from torchvision.extension import _has_ops

    if _has_ops():
        return Finding("torchvision", "ok", torchvision.__version__)
    found = f"{torchvision.__version__}, built for another torch: dinogen uses its own nms instead"
    return Finding("torchvision", "note", found, "nothing to do: no other operator of it is used")


def check_weights() -> Finding:
    """Weights of the default guide: here, on the network, or unreachable."""
    from dinogen.config import GuideConfig
    from dinogen.features.checkpoint import weights_reachable

    path = GuideConfig().path
    place = weights_reachable(path)
    if place is None:
        return Finding(
            "guide weights",
            "warn",
            f"{path} cannot be reached",
            f"on a machine with network run: hf download {path} --local-dir dinov2; copy that "
            "folder here and set guide.path to it; the demo needs none: its guide is installed",
        )
    return Finding("guide weights", "ok", f"{path}: {place}")


def check_slurm() -> Finding:
    """Slurm's sbatch on the PATH, and whether it answers."""
    sbatch = shutil.which("sbatch")
    if sbatch is None:
        return Finding(
            "Slurm", "note", "no sbatch on the PATH", "only needed on clusters: try a login node"
        )
    answer = subprocess.run(
        [sbatch, "--version"], capture_output=True, text=True, timeout=3, check=False
    )
    if answer.returncode:
        return Finding(
            "Slurm", "warn", f"{sbatch} fails: {answer.stderr.strip()}", "ask the cluster's admin"
        )
    return Finding("Slurm", "ok", f"{answer.stdout.strip()} ({sbatch})")


def check_disk() -> Finding:
    """Free space where the command is run."""
    here = Path.cwd()
    free = shutil.disk_usage(here).free / 1e9
    found = f"{free:.0f} GB free at {here}"
    if free < LOW_DISK_GB:
        return Finding("disk", "warn", found, "70,000 packed faces take about 30 GB: free some")
    return Finding("disk", "ok", found)


def check_cores() -> Finding:
    """Cores that this process may use against the threads that OpenMP will start."""
    import torch

    cores = usable_cores()
    threads = torch.get_num_threads()
    found = f"{cores} usable, {threads} OpenMP threads"
    if threads > cores:
        return Finding(
            "CPU cores", "warn", found, f"more threads than cores: export OMP_NUM_THREADS={cores}"
        )
    return Finding("CPU cores", "ok", found)


def usable_cores(cgroup: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """Cores of this process: its affinity, or less if the container's quota is lower."""
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    try:
        quota, period = cgroup.read_text().split()[:2]
        return max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):
        return cores


def _version(name: str) -> str | None:
    """Version of an installed distribution, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


CHECKS: dict[str, Callable[[], Finding]] = {
    "Python": check_python,
    "packages": check_packages,
    "torch": check_torch,
    "torchvision": check_torchvision,
    "GPUs": check_gpus,
    "attention": check_attention,
    "arithmetic": check_arithmetic,
    "fused Adam": check_optimizer,
    "compiler": check_compiler,
    "pinned memory": check_pinned_memory,
    "collectives": check_collectives,
    "DeepSpeed": check_deepspeed,
    "TurboJPEG": check_turbojpeg,
    "guide weights": check_weights,
    "Slurm": check_slurm,
    "disk": check_disk,
    "CPU cores": check_cores,
}
