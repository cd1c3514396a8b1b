"""Make ``import torchvision`` work where its compiled operators do not fit the installed torch.

The registry's torchvision wheel is linked to CUDA torch. Beside a CPU-only torch its library does
not load, and ``import torchvision`` fails with ``operator torchvision::nms does not exist``;
facenet-pytorch, transformers, torchmetrics, lpips and torch-fidelity fall with it.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_MISSING_OPERATORS = "operator torchvision::nms does not exist"
_libraries: list[torch.library.Library] = []  # an operator lives as long as its Library object


def ensure_torchvision() -> None:
    """Import torchvision, and give it a non-maximum suppression for CPU if it has none of its own.

    Call it before the first import of a package that needs torchvision. It does nothing where the
    native import works. ``torchvision.io`` and the other compiled operators stay unusable.

    Raises:
        ImportError: torchvision is not installed.
        RuntimeError: torchvision fails for another reason than the missing operators.
    """
    try:
        import torchvision
    except RuntimeError as error:
        if _MISSING_OPERATORS not in str(error):
            raise
    else:
        return

    import torch

    for name in [n for n in sys.modules if n.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.impl("nms", nms, "CPU")
    _libraries.append(library)

    import torchvision.ops.boxes

    torchvision.ops.boxes._assert_has_ops = lambda: None


def nms(boxes: torch.Tensor, scores: torch.Tensor, iou_threshold: float) -> torch.Tensor:
    """Greedy non-maximum suppression, as ``torchvision.ops.nms``.

    Args:
        boxes: ``(N, 4)`` corners ``x1, y1, x2, y2``, any unit.
        scores: ``(N,)``; of equal scores the earlier box goes first.
        iou_threshold: a box is dropped if its intersection over union with a kept box of higher
            score is greater than this.

    Returns:
        ``(K,)`` int64 indices of the kept boxes, highest score first.
    """
    import numpy as np
    import torch

    # numpy, because a loop of small torch operations costs ten times as much
    order = torch.argsort(scores, descending=True, stable=True).numpy()
    corners = boxes.numpy()
    low, high = corners[:, :2], corners[:, 2:]
    areas = (high - low).prod(axis=1)
    kept: list[int] = []
    while len(order):
        best, order = order[0], order[1:]
        kept.append(int(best))
        overlap = np.minimum(high[order], high[best]) - np.maximum(low[order], low[best])
        intersection = overlap.clip(min=0).prod(axis=1)
        # multiplied, not divided: two boxes without area have no overlap
        union = areas[order] + areas[best] - intersection
        order = order[~(intersection > iou_threshold * union)]
    return torch.tensor(kept, dtype=torch.int64)
