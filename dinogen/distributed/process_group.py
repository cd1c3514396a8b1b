"""The only reader of RANK, LOCAL_RANK, WORLD_SIZE and SLURM_*: process group, device, collectives.

Everything here also works without a process group, as a world of one rank. Rank 0 is not always
on the first node, so nothing may be concluded from the host's name or index.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as td
from torch import Tensor

from dinogen.errors import UserError
from shards.read.order import share_of, share_sizes

log = logging.getLogger(__name__)

_TIMEOUT = timedelta(minutes=30)
_LONGEST_NAP = 0.1  # seconds between two polls of the store
_LEAVING = 30.0  # seconds that rank 0 stays for others: one may have been killed at the very end
_LOOPBACK = "127.0.0.1"
# How launchers other than torchrun say how many processes they started: srun, Open MPI, MPICH and
# Intel MPI, MVAPICH.
_STARTED = (
    ("SLURM_STEP_NUM_TASKS", "srun"),
    ("OMPI_COMM_WORLD_SIZE", "mpirun"),
    ("PMI_SIZE", "mpirun"),
    ("MV2_COMM_WORLD_SIZE", "mpirun"),
)


class DistError(UserError):
    """The processes cannot form one run; the message says how to start them."""

    exit_code = 1  # a node that was lost may be there again: worth another try


def rank() -> int:
    """This process's number over all nodes, 0 to ``world_size() - 1``."""
    return td.get_rank() if _grouped() else _count("RANK", 0)


def world_size() -> int:
    """Number of processes over all nodes; 1 without torchrun."""
    return td.get_world_size() if _grouped() else _count("WORLD_SIZE", 1)


def local_rank() -> int:
    """This process's number on its node."""
    return _count("LOCAL_RANK", 0)


def local_world_size() -> int:
    """Number of processes on this node."""
    # set by torchrun and by deepspeed's launcher
    return _count("LOCAL_WORLD_SIZE", _count("LOCAL_SIZE", 1))


def on_one_machine() -> bool:
    """Whether all processes run on this machine, as far as their launcher says."""
    return local_world_size() == world_size()


def is_main() -> bool:
    """True on rank 0, which alone writes what all ranks share."""
    return rank() == 0


def use_device(name: str) -> None:
    """Choose where everything is computed; to be called before anything else here.

    Args:
        name: ``auto`` (a CUDA GPU, else Apple's, else the CPU), ``cuda``, ``mps`` or ``cpu``.

    Raises:
        DistError: this machine has no such device, or it cannot be shared by several processes.
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not there.get(name, True):
        raise DistError(f"device: {name} is not available on this machine: use auto or cpu")
    if name == "mps" and world_size() > 1:
        raise DistError("device: mps computes in one process alone: start it without torchrun")
    _Choice.device = name


def device() -> torch.device:
    """The GPU of this local rank, or the CPU where there is none; see :func:`use_device`.

    Raises:
        DistError: more local ranks than GPUs.
    """
    if _Choice.device in ("mps", "cpu") or not torch.cuda.is_available():
        apple = torch.backends.mps.is_available() and world_size() == 1
        return torch.device("mps" if apple and _Choice.device != "cpu" else "cpu")
    if local_rank() >= torch.cuda.device_count():
        raise DistError(
            f"local rank {local_rank()} finds only {torch.cuda.device_count()} GPU(s): start at "
            "most one process per GPU (torchrun --nproc-per-node)"
        )
    return torch.device("cuda", local_rank())


def init(alone: bool = False) -> None:
    """Join the other processes of torchrun and choose the device; does nothing the second time.

    NCCL on GPUs, gloo on CPUs. One process alone gets no process group, unless ``alone`` is set.

    Args:
        alone: make a process group of one rank too, for libraries that cannot do without.

    Raises:
        DistError: several tasks were started by srun or mpirun without torchrun, so none knows the
            others; or there are more local ranks than GPUs.
    """
    check_known()
    chosen = device()
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if _grouped() or (world_size() == 1 and not alone):
        return
    os.environ.setdefault("LOCAL_RANK", str(local_rank()))  # DeepSpeed always needs it
    on_gpu = chosen.type == "cuda"
    if not on_gpu and on_one_machine():
        _use_loopback()
    store: Any = _store() if world_size() > 1 else td.HashStore()  # type: ignore[attr-defined]
    td.init_process_group(
        "nccl" if on_gpu else "gloo",
        store=store,
        rank=rank(),
        world_size=world_size(),
        timeout=_TIMEOUT,
        device_id=chosen if on_gpu else None,
    )
    # A connection of its own: the process group waits on the other one, and holds it meanwhile.
    _Control.store = None if world_size() == 1 else td.PrefixStore("control", store.clone())  # type: ignore[attr-defined]
    _Control.num_waits = 0


def check_known() -> None:
    """Refuse to be one of several processes of which none knows the others.

    Each would do the whole work alone, and write into the same folder as all the others.

    Raises:
        DistError: srun or mpirun started several, without torchrun.
    """
    if "WORLD_SIZE" not in os.environ:
        for name, starter in _STARTED:
            if (num := _count(name, 1)) > 1:
                raise DistError(
                    f"{starter} started {num} tasks that do not know each other ({name}={num}): "
                    "start one task per node and torchrun in it, as the scripts in slurm/ do, or "
                    "use dinogen launch"
                )
    elif world_size() > 1 and "RANK" not in os.environ:
        raise DistError(
            f"WORLD_SIZE is {world_size()} but RANK is not set, so no process knows which one it "
            f"is{started_by_slurm()}: start with torchrun, as the scripts in slurm/ do"
        )


def started_by_slurm() -> str:
    """A hint for errors of processes that get in each other's way; empty if none applies.

    A batch script and the shell of ``salloc`` have SLURM_PROCID too, but are one process,
    regardless of the job's number of tasks: SLURM_NTASKS does not describe them.
    """
    number = os.environ.get("SLURM_PROCID")
    if number is None or under_agent():
        return ""
    if number.strip() == "0" and _count("SLURM_STEP_NUM_TASKS", 1) < 2:
        return ""
    return (
        f" (this is task {number} of a SLURM job; srun without torchrun starts "
        "processes that do not know each other)"
    )


def shutdown() -> None:
    """Leave the process group, if there is one; rank 0 last, as it may host the store."""
    if not _grouped():
        return
    linger("left", range(world_size()), _LEAVING)
    _Control.store = None
    td.destroy_process_group()


def control_store() -> Any | None:
    """The store by which ranks tell each other things without a collective; None if alone."""
    return _Control.store


def linger(word: str, ranks: Iterable[int], seconds: float) -> None:
    """Say a word; rank 0, with which the store may go, stays until others have said it too.

    Args:
        word: not said before.
        ranks: for whom rank 0 waits.
        seconds: and how long at most.
    """
    store = _Control.store
    if store is None:
        return
    words = [f"{word}/{number}" for number in ranks]
    until = time.monotonic() + seconds
    with suppress(RuntimeError):  # the store is gone: nobody can be waited for
        store.set(f"{word}/{rank()}", "")
        while is_main() and time.monotonic() < until and not store.check(words):
            time.sleep(0.02)


def lost_connection(error: BaseException) -> bool:
    """Whether a collective failed because another rank is gone."""
    if isinstance(error, td.DistBackendError | td.DistNetworkError | td.DistStoreError):
        return True
    broken = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")
    return isinstance(error, RuntimeError) and any(words in str(error) for words in broken)


def under_agent() -> bool:
    """Whether torchrun started this process: it takes any exit code but 0 for a failure."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def set_cpu_threads() -> None:
    """Share this node's cores among its processes; more threads than cores only spin.

    An OMP_NUM_THREADS in the environment wins. torchrun sets it to 1 where it is unset, so who
    starts torchrun by hand on CPUs should set it to cores / processes.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        affinity = getattr(os, "sched_getaffinity", None)  # Linux only
        num_cores = len(affinity(0)) if affinity else os.cpu_count() or 1
        torch.set_num_threads(max(1, num_cores // local_world_size()))


@contextmanager
def rank_zero_section() -> Iterator[bool]:
    """Rank 0's own work, such as sampling; the others wait at its end for as long as it takes.

    Waiting in a collective would end in its time-out. Every rank has to enter; the value says
    whether this one has to do the work.
    """
    yield is_main()
    store = _Control.store
    if store is None:
        return
    _Control.num_waits += 1
    if is_main():
        store.set("main", str(_Control.num_waits))
        return
    _nap_until(lambda: store.check(["main"]) and int(store.get("main")) >= _Control.num_waits)


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum over all ranks, as a new tensor on the same device; not differentiable."""
    total = tensor.detach().to(_collective_device(tensor), copy=True)
    if _grouped():
        td.all_reduce(total)
    return total.to(tensor.device)


def all_reduce_sum_with_gradient(tensor: Tensor) -> Tensor:
    """Sum over all ranks whose gradient, to any order, is the sum of all ranks' gradients."""
    total: Tensor = _Sum.apply(tensor)
    return total


def all_gather(tensor: Tensor) -> Tensor:
    """Tensors of all ranks, of one shape, joined along their first dimension in rank order."""
    if not _grouped():
        return tensor.detach().clone()
    mine = tensor.detach().to(_collective_device(tensor)).contiguous()
    parts = [torch.empty_like(mine) for _ in range(world_size())]
    td.all_gather(parts, mine)
    return torch.cat(parts).to(tensor.device)


def any_rank(flag: bool) -> bool:
    """True on every rank if ``flag`` is true on at least one."""
    return bool(all_reduce_sum(torch.tensor(int(flag))).item())


def broadcast_object(obj: Any) -> Any:
    """Rank 0's ``obj`` on every rank, sent as JSON (so tuples arrive as lists, on rank 0 too).

    Raises:
        TypeError: the object of rank 0 cannot be written as JSON.
    """
    if not _grouped():
        return json.loads(json.dumps(obj))
    target = _collective_device(torch.empty(0))
    data = bytearray(json.dumps(obj).encode()) if is_main() else bytearray()
    size = torch.tensor(len(data), device=target)
    td.broadcast(size, src=0)
    if is_main():
        payload = torch.frombuffer(data, dtype=torch.uint8).to(target)
    else:
        payload = torch.empty(int(size), dtype=torch.uint8, device=target)
    td.broadcast(payload, src=0)
    return json.loads(payload.cpu().numpy().tobytes())


def _count(name: str, default: int) -> int:
    """A number that who started this process has put into its environment.

    Raises:
        DistError: it is not a number.
    """
    text = os.environ.get(name, "").strip()
    if not text:
        return default
    if not text.isdigit():
        raise DistError(f"{name} is '{text}' in the environment, which is not a number: unset it")
    return int(text)


def _use_loopback() -> None:
    """Let gloo's ranks find each other without the name of this machine, which no DNS may know."""
    names = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]
    if names:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", names[0])


def _is_nameless(address: str) -> bool:
    """Whether an address is the name of this machine, and no DNS knows it."""
    try:
        socket.getaddrinfo(address, None)
    except OSError:
        return address in (socket.gethostname(), socket.getfqdn())
    return False


class _Sum(torch.autograd.Function):
    """Sum over ranks; what each rank puts in changes the losses of all of them."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return all_reduce_sum(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return all_reduce_sum_with_gradient(gradient)


class _Control:
    """State of the control store, which works without collectives; the same on every rank."""

    store: Any | None = None
    num_waits = 0


class _Choice:
    device = "auto"


def _nap_until(met: Callable[[], bool]) -> None:
    nap = 0.001
    while not met():
        time.sleep(nap)
        nap = min(2 * nap, _LONGEST_NAP)


def _grouped() -> bool:
    return td.is_available() and td.is_initialized()


def _collective_device(tensor: Tensor) -> torch.device:
    """Where the backend can move the tensor: NCCL knows GPUs only."""
    if _grouped() and td.get_backend() == "nccl" and tensor.device.type != "cuda":
        return device()
    return tensor.device


def _store() -> Any:
    """The store on which ranks find each other.

    After a restart by torchrun the keys of the dead attempt may still be there, and ranks that
    meet them wait for processes that are gone. Hence every attempt has its own prefix. Where the
    torchrun agent hosts the store, all ranks are its clients; otherwise rank 0 hosts it.

    Where all ranks are on one machine, so is the store of rank 0, whose name need not be known to
    any DNS. An agent's store may be on another machine, if torchrun's endpoint is; but not where
    its address is the name of this one.
    """
    agent_hosts = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    except KeyError as error:
        raise DistError(
            f"WORLD_SIZE is {world_size()} but {error.args[0]} is not set: start with torchrun"
        ) from None
    if on_one_machine() and not agent_hosts:
        address = _LOOPBACK
    elif _is_nameless(address):
        log.info("no DNS knows this machine's name %s: the loopback address is used", address)
        address = _LOOPBACK
    store = td.TCPStore(  # type: ignore[attr-defined]
        address,
        port,
        world_size(),
        is_master=rank() == 0 and not agent_hosts,
        timeout=_TIMEOUT,
        wait_for_workers=False,
        multi_tenant=not agent_hosts,
    )
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return td.PrefixStore(f"attempt{attempt}", store)  # type: ignore[attr-defined]


def gather_counts(num: int) -> list[int]:
    """``num`` of every rank, in rank order."""
    counts: list[int] = all_gather(torch.tensor([num])).tolist()
    return counts


def gather_rows(tensor: Tensor, counts: Sequence[int]) -> Tensor:
    """Tensors (n, ...) of all ranks, alike but for n, joined in rank order.

    Args:
        tensor: this rank's.
        counts: n of every rank, which may be 0, as :func:`gather_counts` gives them.
    """
    if world_size() == 1:
        return tensor.detach()
    most = max(counts)
    padded = tensor.new_zeros(most, *tensor.shape[1:])
    padded[: len(tensor)] = tensor.detach()
    parts = all_gather(padded).unflatten(0, (len(counts), most))
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def gather_text(text: str) -> list[str]:
    """``text`` of every rank, in rank order."""
    data = torch.tensor(list(text.encode()), dtype=torch.uint8)
    counts = gather_counts(len(data))
    return [bytes(part.tolist()).decode() for part in gather_rows(data, counts).split(counts)]


class Ranks:
    """The ranks of this run, and how they exchange samples of which each has a share.

    Tensors (n, L, C) of this rank's n samples at all L locations become (N, l, C) of all N samples
    at this rank's l locations, and back: each rank sends and holds 1/W of the whole. Nothing here
    has a gradient.

    Attributes:
        rank: of this process.
        num: W.
    """

    def __init__(self) -> None:
        self.rank, self.num = rank(), world_size()

    def share(self, num: int) -> slice:
        """Which of ``num`` samples, locations or others this rank has; maybe none."""
        return share_of(num, self.rank, self.num)

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over all ranks; it may change its argument."""
        if self.num > 1:
            td.all_reduce(tensor)
        return tensor

    def to_locations(self, samples: Tensor, counts: Sequence[int]) -> Tensor:
        """All samples at this rank's locations (N, l, C), from its own samples (n, L, C).

        Args:
            samples: of this rank.
            counts: n of every rank.
        """
        if self.num == 1:
            return samples
        num, width = samples.shape[1:]
        own, sizes = counts[self.rank], share_sizes(num, self.num)
        sent = [size * own * width for size in sizes]
        packed = samples.new_empty(sum(sent))
        parts = samples.detach().split(sizes, 1)
        for part, run in zip(parts, packed.split(sent), strict=True):
            run.view_as(part).copy_(part)
        mine = sizes[self.rank]
        found = self._exchange(packed, sent, [mine * count * width for count in counts])
        return found.view(sum(counts), mine, width)

    def to_samples(self, locations: Tensor, counts: Sequence[int], num: int) -> Tensor:
        """This rank's samples at all locations (n, L, C), from all samples at its own (N, l, C).

        Args:
            locations: all samples at those of this rank.
            counts: n of every rank.
            num: L.
        """
        if self.num == 1:
            return locations
        mine, width = locations.shape[1:]
        own, sizes = counts[self.rank], share_sizes(num, self.num)
        sent, received = ([n * mine * width for n in counts], [own * n * width for n in sizes])
        parts = self._exchange(locations.reshape(-1), sent, received).split(received)
        shaped = [part.view(own, n, width) for part, n in zip(parts, sizes, strict=True)]
        return torch.cat(shaped, 1)

    def whole(self, locations: Tensor, num: int) -> Tensor:
        """All samples at all locations (N, L, C), from all samples at this rank's (N, l, C)."""
        if self.num == 1:
            return locations
        return gather_rows(locations.transpose(0, 1), share_sizes(num, self.num)).transpose(0, 1)

    def _exchange(self, numbers: Tensor, sent: list[int], received: list[int]) -> Tensor:
        """Runs of (n,) numbers, one to each rank, against one from each, joined in rank order."""
        out = numbers.new_empty(sum(received))
        td.all_to_all_single(out, numbers, received, sent)
        return out
