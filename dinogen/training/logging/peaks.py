"""Peak arithmetic of GPUs: what a run's speed is compared with."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Peaks:
    """Dense 10^12 FLOP/s of a GPU; a multiplication and an addition count as two.

    Attributes:
        half: products of float16 and bfloat16, summed in float32, on tensor cores.
        single: products of float32 outside of tensor cores.
        tf32: products of TensorFloat-32 on tensor cores; None before Ampere, which has neither
            these nor those of bfloat16.
    """

    half: float
    single: float
    tf32: float | None = None


# By the name that the driver gives. From NVIDIA's data sheets of each GPU, halved where
# these count sparse products; of GeForce and RTX from the white papers "NVIDIA Ampere GA102 GPU
# Architecture" and "NVIDIA Ada GPU Architecture". A part of a GPU (MIG) matches none.
PEAKS: dict[str, Peaks] = {
    r"V100-SXM\w-\d+GB": Peaks(125.0, 15.7),
    r"V100-PCIE-\d+GB": Peaks(112.0, 14.0),
    r"T4": Peaks(65.0, 8.1),
    r"A100-(SXM4|PCIE)-\d+GB|A100 80GB PCIe": Peaks(312.0, 19.5, 156.0),
    r"A10": Peaks(125.0, 31.2, 62.5),
    r"RTX A6000": Peaks(154.8, 38.7, 77.4),
    r"GeForce RTX 3090": Peaks(71.0, 35.6, 35.6),
    r"GeForce RTX 4090": Peaks(165.2, 82.6, 82.6),
    r"L4": Peaks(121.0, 30.3, 60.0),
    r"L40S": Peaks(362.0, 91.6, 183.0),
    r"H100( 80GB HBM3)?": Peaks(989.4, 66.9, 494.7),
    r"H100 PCIe": Peaks(756.0, 51.0, 378.0),
    r"H100 NVL": Peaks(835.0, 60.0, 417.0),
    r"H200": Peaks(989.4, 66.9, 494.7),
}


def peak_flops(device_name: str, precision: str, tf32: bool) -> float | None:
    """Dense FLOP/s that a GPU reaches at most; None if that is not known.

    Args:
        device_name: as ``torch.cuda.get_device_name`` gives it.
        precision: "fp32", "bf16" or "fp16".
        tf32: whether products of float32 may be computed as TensorFloat-32.
    """
    bare = re.sub(r"^(NVIDIA|Tesla) ", "", device_name)
    peaks = next((found for name, found in PEAKS.items() if re.fullmatch(name, bare)), None)
    if peaks is None or (precision == "bf16" and peaks.tf32 is None):
        return None
    if precision != "fp32":
        return peaks.half * 1e12
    return (peaks.tf32 if tf32 and peaks.tf32 else peaks.single) * 1e12
