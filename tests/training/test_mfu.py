"""mfu: FLOPs in closed form over the peak of a GPU, which is known by its name."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from dinogen.families.base import Phase
from dinogen.training.logging.mfu import FlopCounter, Mfu
from dinogen.training.logging.peaks import PEAKS, peak_flops

PHASES = [Phase("G", "G", dict), Phase("R1", "D", dict, every=4)]


@pytest.mark.parametrize(
    ("name", "precision", "tf32", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", True, 989.4e12),
        ("NVIDIA H100 PCIe", "bf16", True, 756e12),
        ("NVIDIA H200", "fp16", True, 989.4e12),
        ("NVIDIA A100-SXM4-80GB", "bf16", True, 312e12),
        ("NVIDIA A100-SXM4-40GB", "fp32", True, 156e12),
        ("NVIDIA A100 80GB PCIe", "fp32", False, 19.5e12),
        ("Tesla V100-SXM2-32GB", "fp16", True, 125e12),
        ("Tesla V100-SXM2-32GB", "fp32", True, 15.7e12),
        ("Tesla V100-SXM2-32GB", "bf16", True, None),
        ("Tesla T4", "fp16", True, 65e12),
        ("NVIDIA L4", "bf16", True, 121e12),
        ("NVIDIA L40S", "bf16", True, 362e12),
        ("NVIDIA A10", "bf16", True, 125e12),
        ("NVIDIA RTX A6000", "bf16", True, 154.8e12),
        ("NVIDIA GeForce RTX 4090", "bf16", True, 165.2e12),
        # Names that only begin like a known one.
        ("NVIDIA A10G", "bf16", True, None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16", True, None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "bf16", True, None),
        ("AMD Instinct MI300X", "bf16", True, None),
    ],
)
def test_peaks_by_name(name, precision, tf32, peak):
    assert peak_flops(name, precision, tf32) == peak


def test_tensor_cores_are_faster_than_the_rest():
    assert all(
        peaks.single <= (peaks.tf32 or peaks.single) < peaks.half for peaks in PEAKS.values()
    )


@pytest.fixture
def gpu(monkeypatch):
    """Names the GPU that torch reports; nothing runs on it."""
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "NVIDIA L4")
    return torch.device("cuda")


def linear_step(batch):
    """One layer, 5 -> 7, forward and backward, without the gradient of its input."""
    layer = nn.Linear(5, 7)
    layer(torch.ones(batch, 5)).sum().backward()
    return 2 * (2 * batch * 5 * 7)


def test_it_is_flops_over_time_and_peak(gpu):
    mfu = Mfu(PHASES, gpu, "bf16", compiled=False)
    done = 0
    # R1 runs at every fourth step, and its steps do more.
    for number in range(6):
        with mfu.step(number):
            done += linear_step(32 if number % 4 == 0 else 8)
    assert mfu.since_last_line(2.0) == {"mfu": pytest.approx(done / 2.0 / 121e12)}
    with mfu.step(6):
        done = linear_step(8)
    assert mfu.since_last_line(0.5) == {"mfu": pytest.approx(done / 0.5 / 121e12)}


def test_each_kind_of_step_is_counted_once(gpu, monkeypatch):
    mfu = Mfu(PHASES, gpu, "bf16", compiled=False)
    made = []
    monkeypatch.setattr(
        "dinogen.training.logging.mfu.FlopCounter", lambda: made.append(FlopCounter()) or made[-1]
    )
    for number in range(20):
        with mfu.step(number):
            linear_step(8)
    assert len(made) == 2


@pytest.mark.parametrize(
    ("device", "name", "compiled"),
    [("cpu", "NVIDIA L4", False), ("cuda", "Imagined 1", False), ("cuda", "NVIDIA L4", True)],
)
def test_elsewhere_nothing_is_counted(monkeypatch, device, name, compiled):
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: name)
    monkeypatch.setattr("dinogen.training.logging.mfu.FlopCounter", None)
    mfu = Mfu(PHASES, torch.device(device), "bf16", compiled)
    with mfu.step(0):
        linear_step(8)
    assert mfu.since_last_line(1.0) == {}


def penalised(x):
    """Gradients of a convolutional step with a gradient penalty and attention."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Tanh(), nn.Conv2d(8, 8, 3, groups=4))
    out = network(x)
    (grad,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    q = out.flatten(2)
    (F.scaled_dot_product_attention(q, q, q).sum() + grad.square().sum()).backward()
    return [p.grad for p in network.parameters()]


def test_counting_changes_no_bit():
    x = torch.randn(2, 3, 12, 12, requires_grad=True)
    plain = penalised(x)
    with FlopCounter():
        counted = penalised(x)
    assert all(torch.equal(a, b) for a, b in zip(plain, counted, strict=True))


def test_second_derivatives_count():
    layer, x = nn.Linear(5, 7, bias=False), torch.randn(4, 5, requires_grad=True)
    with FlopCounter() as counter:
        (grad,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
        grad.square().sum().backward(inputs=[layer.weight])
    # y = W x; its gradient W' y; of the square of that: by y, by W twice, here and through y.
    assert counter.flops == 5 * 2 * 4 * 5 * 7


def test_it_agrees_with_torch_where_torch_can_count():
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ConvTranspose2d(8, 6, 4, stride=2), nn.Flatten(2)
    )
    x = torch.randn(2, 3, 12, 12)

    def step():
        q = network(x)
        (q @ q.mT).sum().backward()

    with FlopCounter() as counter:
        step()
    with FlopCounterMode(display=False) as reference:
        step()
    assert counter.flops == reference.get_total_flops() > 0
