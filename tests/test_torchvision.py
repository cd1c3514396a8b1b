"""torchvision beside a torch that it was not built for."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from dinogen._torchvision import ensure_torchvision, nms


def overlap(a, b):
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    both = width * height
    return both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both)


def brute_force(boxes, scores, threshold):
    kept = []
    for i in sorted(range(len(boxes)), key=lambda i: -scores[i]):
        if all(overlap(boxes[i], boxes[j]) <= threshold for j in kept):
            kept.append(i)
    return kept


@pytest.mark.parametrize("num", [0, 1, 2, 30, 200])
@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.7, 1.0])
def test_nms_equals_brute_force(num, threshold):
    rng = np.random.default_rng(num)
    low = rng.uniform(-20, 60, (num, 2))
    boxes = np.concatenate([low, low + rng.uniform(5, 40, (num, 2))], axis=1)
    scores = rng.permutation(num) / max(1, num)
    kept = nms(torch.from_numpy(boxes), torch.from_numpy(scores), threshold)
    assert kept.dtype == torch.int64
    assert kept.tolist() == brute_force(boxes.tolist(), scores.tolist(), threshold)


def test_of_equal_scores_the_earlier_box_is_kept():
    boxes = torch.tensor([[0.0, 0, 10, 10], [1, 1, 11, 11], [50, 50, 60, 60]])
    assert nms(boxes, torch.tensor([0.5, 0.5, 0.9]), 0.3).tolist() == [2, 0]


def test_boxes_without_area_do_not_overlap():
    boxes = torch.tensor([[5.0, 5, 5, 5], [5, 5, 5, 5], [0, 0, 10, 10]])
    assert nms(boxes, torch.tensor([0.9, 0.8, 0.7]), 0.3).tolist() == [0, 1, 2]


def test_torchvision_and_its_dependents_import():
    ensure_torchvision()
    ensure_torchvision()
    import facenet_pytorch
    import torchvision
    from torchvision.ops import batched_nms

    assert torchvision.ops.nms
    assert facenet_pytorch.MTCNN
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 10], [0, 0, 10, 10]])
    kept = batched_nms(boxes, torch.tensor([0.9, 0.8, 0.7]), torch.tensor([0, 1, 0]), 0.5)
    assert kept.tolist() == [0, 1]


def run_with_torchvision(folder, source):
    """What ``ensure_torchvision`` does where ``import torchvision`` runs ``source``."""
    package = folder / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text(source)
    code = (
        f"import sys; sys.path.insert(0, {str(folder)!r})\n"
        "import dinogen._torchvision as shim\n"
        "shim.ensure_torchvision()\n"
        "import torchvision\n"
        "print('libraries', len(shim._libraries), 'loads', torchvision.loads)\n"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_a_working_torchvision_is_left_alone(tmp_path):
    done = run_with_torchvision(tmp_path, "loads = 'once'\n")
    assert done.stdout.strip() == "libraries 0 loads once", done.stderr


def test_another_failure_of_torchvision_is_not_hidden(tmp_path):
    done = run_with_torchvision(tmp_path, "raise RuntimeError('disk on fire')\n")
    assert done.returncode != 0
    assert "disk on fire" in done.stderr
