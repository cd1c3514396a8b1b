"""Little programs on a fake GPU, run by test_counting.py in a process of their own.

A line that ends with the comment ``sync``, ``waits``, ``blocking`` or ``copies`` has to be counted
as that, once, and no other line.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from inspect import isgeneratorfunction
from pathlib import Path

HERE = Path(__file__).resolve()
PROGRAMS: dict[str, Callable] = {}


def program(function):
    PROGRAMS[function.__name__] = function
    return function


@program
def an_item_is_read(x):
    x.sum().item()  # sync


@program
def a_condition_is_read(x):
    if (x > 0).all():  # sync
        x.add_(1)


@program
def a_list_is_read(x):
    x.tolist()  # sync


@program
def it_goes_to_the_host(x):
    x.cpu()  # sync


@program
def an_array_is_made(x):
    x.float().cpu().numpy()  # sync


@program
def a_mask_selects(x):
    x[x > 0]  # sync


@program
def a_mask_assigns(x):
    x[x > 0] = 0.0  # sync


@program
def nonzeros_are_found(x):
    x.nonzero()  # sync


@program
def different_values_are_found(x):
    x.unique()  # sync


@program
def two_are_compared(x):
    torch.equal(x, x)  # sync


@program
def the_number_of_repeats_is_read(x):
    x.repeat_interleave(torch.ones_like(x, dtype=torch.int64))  # sync


@program
def ordinary_memory_blocks(x):
    torch.ones(3).to("cuda")  # blocking
    torch.ones(3).to("cuda", non_blocking=True)  # blocking
    x[:3].copy_(torch.ones(3), non_blocking=True)  # blocking


@program
def a_list_is_copied(x):
    torch.tensor([1.0, 2.0], device="cuda")  # blocking
    torch.as_tensor([1, 2]).to(x.device)  # blocking


@program
def an_index_is_copied(x):
    x[torch.tensor([0, 1])]  # blocking


@program
def pinned_memory_is_copied_meanwhile(x):
    torch.ones(3).pin_memory().to("cuda", non_blocking=True)  # copies
    buffer = torch.empty(4, 3, pin_memory=True)
    buffer.fill_(2.0)
    buffer[1:].to("cuda", non_blocking=True)  # copies
    x[:3].copy_(buffer[0], non_blocking=True)  # copies


@program
def pinned_memory_blocks_where_nobody_says_so(x):
    torch.ones(3).pin_memory().to("cuda")  # blocking


@program
def columns_of_pinned_memory_block(x):
    torch.ones(4, 3).pin_memory()[:, 0].to("cuda", non_blocking=True)  # blocking


@program
def other_memory_is_not_pinned(x):
    pinned = torch.ones(3).pin_memory()
    (pinned + 1).to("cuda", non_blocking=True)  # blocking
    assert pinned.is_pinned() and not (pinned + 1).is_pinned()
    del pinned
    assert not any(torch.ones(3).is_pinned() for _ in range(9))  # at the same address, or not


@program
def numbers_arrive_in_pinned_memory(x):
    there = torch.empty(8, pin_memory=True)
    there.copy_(x, non_blocking=True)  # copies
    event = torch.cuda.Event()
    event.record()
    yield
    event.synchronize()  # waits
    assert event.query()
    assert torch.isfinite(there).all()


@program
def numbers_do_not_arrive_in_ordinary_memory(x):
    torch.empty(8).copy_(x, non_blocking=True)  # sync


@program
def an_event_of_this_step_is_waited_for(x):
    event = torch.cuda.current_stream().record_event()
    event.synchronize()  # sync


@program
def all_is_waited_for(x):
    torch.cuda.Stream().synchronize()  # sync
    torch.cuda.synchronize()  # sync


@program
def a_stream_waits(x):
    pinned = torch.ones(3).pin_memory()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        there = pinned.to("cuda", non_blocking=True)  # copies
        done = side.record_event()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.current_stream().wait_event(done)
    there.record_stream(torch.cuda.current_stream())


@program
def what_the_trainer_sends_arrives_a_step_late(x):
    from dinogen.transfer import Arrivals, to_device

    to_device(torch.ones(3), x.device)  # copies
    arrivals = Arrivals(x.device)
    arrivals.send("first", {"norm": x.sum(), "finite": x.isfinite().all()})  # copies
    yield
    note, numbers = arrivals.receive()  # waits
    assert note == "first"
    assert all(0 < number < 1 for number in numbers.values())


@program
def numbers_of_the_host_are_arguments(x):
    x * torch.tensor(2.0) + 1.0
    torch.full((), 3.0, device="cuda")
    torch.arange(4, device="cuda")


@program
def a_backward_reads(x):
    class Reading(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            gradient.sum().item()  # sync
            return gradient

    Reading.apply(x.requires_grad_()).sum().backward()


@program
def flags_of_the_device_change_nothing(x):
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    torch.use_deterministic_algorithms(True)
    with torch.device("cuda"):
        network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ConvTranspose2d(4, 3, 3))
    network.to(memory_format=torch.channels_last)
    image = torch.ones(2, 3, 8, 8, device="cuda").contiguous(memory_format=torch.channels_last)
    with torch.autocast("cuda", torch.bfloat16):
        out = network(image)
    assert out.is_contiguous(memory_format=torch.channels_last)
    out.sum().backward()
    torch.use_deterministic_algorithms(False)


@program
def adam_never_waits(x):
    parameters = [torch.nn.Parameter(torch.ones(4, device="cuda")) for _ in range(3)]
    for kind in ({"fused": True}, {"foreach": True}, {"capturable": True, "foreach": True}):
        optimizer = torch.optim.Adam(parameters, **kind)
        for _ in range(2):
            sum(p.square().sum() for p in parameters).backward()
            if "fused" in kind:
                optimizer.found_inf = torch.zeros((), device="cuda")
            optimizer.step()
            optimizer.zero_grad()


@program
def the_scaler_of_gradients_reads_once(x):
    w = torch.nn.Parameter(torch.ones(4, device="cuda"))
    optimizer, scaler = torch.optim.Adam([w]), torch.amp.GradScaler("cuda", init_scale=2.0)
    with torch.autocast("cuda", torch.float16):
        loss = (w * x[:4]).sum()
    scaler.scale(loss).backward()
    scaler.step(optimizer)  # sync
    scaler.update()
    assert optimizer.state[w]  # a step was made


def _costs() -> dict[str, Callable]:
    """Programs of which launches and FLOPs are compared."""
    a = torch.ones(32, 64, device="cuda")
    b = torch.ones(64, 16, device="cuda")
    image = torch.ones(2, 3, 8, 8, device="cuda")
    weight = torch.ones(5, 3, 3, 3, device="cuda")
    many = [torch.ones(4, device="cuda") for _ in range(120)]
    q = torch.ones(2, 4, 16, 32, device="cuda", dtype=torch.bfloat16)
    attend = torch.nn.functional.scaled_dot_product_attention
    math = torch.nn.attention.SDPBackend.MATH

    def attend_by_operators():
        with torch.nn.attention.sdpa_kernel(math):
            return attend(q, q, q)

    return {
        "three operators": lambda: (a + 1).relu().mul_(2),
        "views": lambda: a.view(-1)[4:].reshape(2, -1).T.unsqueeze(0).expand(3, -1, -1),
        "nothing is written": lambda: torch.empty_like(a),
        "a matrix product": lambda: a @ b,
        "a convolution": lambda: torch.nn.functional.conv2d(image, weight, padding=1),
        "many tensors at once": lambda: torch._foreach_mul_(many, 2.0),
        "attention": lambda: attend(q, q, q),
        "attention by operators": attend_by_operators,
        "attention of columns": lambda: attend(q.mT, q.mT, q.mT),
    }


def _main() -> None:
    root = HERE.parents[2]
    sys.path[:0] = [str(root / "benchmarks"), str(root)]
    from fake_cuda import guard

    guard.load()
    global torch
    import torch
    from fake_cuda import device
    from fake_cuda.mode import Counting, fake_cuda
    from train_steps.counts import GPUS, Gpu

    device.install()
    gpu = Gpu(half=1e12, tf32=1e12, fp32=1e12, bandwidth=1e9)
    assert isinstance(next(iter(GPUS.values())), Gpu)
    found = {}
    with fake_cuda(Counting(HERE.parent, gpu)) as counting:
        for name, function in PROGRAMS.items():
            x = torch.ones(8, device="cuda")
            counting.begin("all")
            counts = counting.now
            if isgeneratorfunction(function):
                for _ in function(x):
                    counting.begin("all")
                    counts += counting.now
                counts += counting.now
            else:
                function(x)
            found[name] = counts.to_dict()
        for name, function in _costs().items():
            counting.begin("all")
            function()
            found[name] = counting.now.to_dict()
        counting.begin("memory")
        live = counting.live
        kept = torch.ones(1000, 1000, device="cuda")
        del kept
        found["memory"] = counting.now.to_dict() | {"left": counting.live - live}
    print(json.dumps(found))


if __name__ == "__main__":
    _main()
