"""What a part of a step costs, and how long a GPU needs for it at least, by a model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

LAUNCH = 2e-6  # seconds; a shorter kernel ends before the next one can begin


@dataclass(frozen=True)
class Gpu:
    """Peak rates of a GPU by its data sheet, without sparsity.

    Attributes:
        half: FLOP/s of float16 and bfloat16 with float32 sums.
        tf32: FLOP/s of float32 matrices rounded to TF32.
        fp32: FLOP/s of float32.
        bandwidth: bytes/s of its memory.
    """

    half: float
    tf32: float
    fp32: float
    bandwidth: float


GPUS = {
    "H200 SXM": Gpu(989e12, 495e12, 67e12, 4.8e12),
    "H100 SXM": Gpu(989e12, 495e12, 67e12, 3.35e12),
    "H100 PCIe": Gpu(756e12, 378e12, 51e12, 2.0e12),
    "A100 SXM 80GB": Gpu(312e12, 156e12, 19.5e12, 2.04e12),
    "A100 PCIe 40GB": Gpu(312e12, 156e12, 19.5e12, 1.56e12),
    "L40S": Gpu(362e12, 183e12, 91.6e12, 0.864e12),
    "RTX 4090": Gpu(165e12, 82.6e12, 82.6e12, 1.01e12),
}
DEFAULT_GPU = "H100 SXM"


@dataclass
class Counts:
    """What was counted; two of them can be added.

    Attributes:
        launches: kernels, and copies between host and device.
        syncs: reads and waits that hold the host until the device has done what this step queued,
            by ``FILE:LINE what``.
        waits: waits for events of earlier steps.
        blocking: copies to the device that hold the host.
        copies: number of asynchronous copies, either way.
        flops: of matrix products, convolutions and attention.
        moved: bytes that kernels read and write.
        seconds: that the device is busy: modelled or measured.
        at_peak: seconds of the FLOPs alone at the peak rate of the step's precision.
        peak: largest number of bytes that tensors take at once.
        launched: launches by ``FILE:LINE operator``, where they were requested.
    """

    launches: int = 0
    syncs: Counter[str] = field(default_factory=Counter)
    waits: Counter[str] = field(default_factory=Counter)
    blocking: Counter[str] = field(default_factory=Counter)
    copies: Counter[str] = field(default_factory=Counter)
    flops: float = 0.0
    moved: float = 0.0
    seconds: float = 0.0
    at_peak: float = 0.0
    peak: int = 0
    launched: Counter[str] = field(default_factory=Counter)

    def __add__(self, other: Counts) -> Counts:
        added = {
            name: getattr(self, name) + getattr(other, name)
            for name in self.__dataclass_fields__
            if name != "peak"
        }
        return Counts(**added, peak=max(self.peak, other.peak))

    @property
    def mfu(self) -> float:
        """Share of the peak rate that the FLOPs reach: a ceiling where seconds are modelled."""
        return self.at_peak / self.seconds if self.seconds else 0.0

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, with what follows from it."""
        numbers = {
            name: dict(value) if isinstance(value, Counter) else value
            for name, value in vars(self).items()
        }
        return numbers | {
            "num_syncs": self.syncs.total(),
            "num_waits": self.waits.total(),
            "num_blocking": self.blocking.total(),
            "num_copies": self.copies.total(),
            "mfu": self.mfu,
        }


def total(parts: Iterable[Counts]) -> Counts:
    """Their sum."""
    return sum(parts, Counts())


def gpu_called(name: str) -> str | None:
    """The GPU of the table whose words are all in the name that the driver gives."""
    words = name.upper().replace("-", " ")
    for known in GPUS:
        model, *kind = known.upper().split()
        if model in words and all(word in words or word == "SXM" for word in kind):
            return known
    return None
