"""The engine of one process, which the others extend: backward, optimizers, batch norm."""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from dinogen.batch import Batch, Losses, Scalars
from dinogen.config import Config, ConfigError, EngineConfig, OptimConfig
from dinogen.distributed import process_group
from dinogen.families.abilities import RunsFrozen, ScalesOptimizer, trained_parameters
from dinogen.families.base import Family, Phase
from dinogen.training.engines.batch_norm import sync_batch_norms
from dinogen.transfer import to_device

COMPILER = "inductor"  # torch.compile's backend

# of glibc's malloc.h, and values for them
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_MOST_KEPT = 2**31 - 1  # bytes
_MOST_ON_HEAP = 2**30  # bytes; a larger block goes back to the system when it is freed


@dataclass(frozen=True)
class Update:
    """What became of one optimizer step, on the device: nothing has waited for it yet.

    Attributes:
        grad_norm: total norm before clipping, a scalar. It is not finite where a gradient or loss
            was not, on any rank: nothing was changed then.
    """

    grad_norm: Tensor

    @property
    def applied(self) -> Tensor:
        """A bool scalar, the same on every rank."""
        return self.grad_norm * 0 == 0  # half as many kernels as torch.isfinite


class SingleEngine:
    """One process.

    A loss is a mean over the samples of its microbatch; ``backward`` weighs it by the microbatch's
    share of the global batch, so any cut into ranks and microbatches gives the same gradient.

    Args:
        config: the whole run.
        family: its networks are trained; ``prepare`` has to be called before the first step.
        lr: learning rate of every network.
        device: where the networks live.
    """

    def __init__(self, config: Config, family: Family, lr: float, device: torch.device) -> None:
        self.config, self.freeze = config.engine, config.freeze
        self.family = family
        self.device = device
        if process_group.world_size() > 1:
            for network in family.networks.values():
                sync_batch_norms(network)
        self.precision = resolve_precision(self.config.precision, device)
        # Of torch's ways to take a step, the fastest, and the only one that a GPU can leave out.
        self.fused = device.type in ("cuda", "cpu")
        self.optimizers = {
            name: build_optimizer(
                network.parameters(), config.optim, lr, family, name, fused=self.fused
            )
            for name, network in family.networks.items()
        }
        self.scalers = {
            name: torch.amp.GradScaler(device.type, enabled=self.precision == "fp16")
            for name in family.networks
        }
        # Listed once: to walk through the modules takes longer than to set a flag.
        self.parameters = {name: list(net.parameters()) for name, net in family.networks.items()}
        self.trained: dict[str, list[nn.Parameter]] = {}
        self.live: str | None = None
        if self.config.compile:
            frozen = family.frozen if isinstance(family, RunsFrozen) else ()
            for network in (*family.networks.values(), *frozen):
                network.compile(backend=COMPILER)

    def prepare(self) -> None:
        """Take over which parameters train now; called at the start and where a fade-in ends."""
        for name, network in self.family.networks.items():
            names = trained_parameters(self.family, name, self.freeze)
            self.trained[name] = [p for n, p in network.named_parameters() if n in names]
        self.live = None

    def set_lr(self, factor: float) -> None:
        """Learning rates of the next step, as a share of what they were built with."""
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = factor * group.setdefault("initial_lr", group["lr"])

    def before(self, phase: Phase, micros: Sequence[tuple[Batch, int]]) -> None:
        """Let a phase look at all of a step's microbatches, if it wants to."""
        if phase.before is not None:
            with torch.no_grad(), self._autocast():
                phase.before(micros)

    def losses(self, phase: Phase, batch: Batch, last: bool) -> Losses:
        """Forward of a microbatch; ``last`` says that a step follows its backward."""
        self._train_only(phase.network)
        with self._compiled(phase), self._explained(phase), self._autocast():
            return self._forward(phase, batch, last)

    def backward(self, phase: Phase, losses: Scalars, weight: float) -> Tensor:
        """Add the gradients of the summed losses, weighed by the share of the global batch.

        Returns:
            The sum, a scalar without gradient.
        """
        with self._explained(phase):
            total, scaled = self._scaled(phase, losses, weight)
            scaled.backward()
        return total

    def step(self, phase: Phase) -> Update:
        """One optimizer step, unless a gradient or loss is not finite; the host does not wait."""
        optimizer, scaler = self.optimizers[phase.network], self.scalers[phase.network]
        scaler.unscale_(optimizer)
        gradients = [p.grad for p in self.trained[phase.network] if p.grad is not None]
        update = Update(total_norm(gradients))
        if self.config.clip_grad_norm is not None:
            # as torch.nn.utils.clip_grad_norm_ does
            factor = self.config.clip_grad_norm / (update.grad_norm + 1e-6)
            torch._foreach_mul_(gradients, factor.clamp(max=1))
        if self.fused:
            # The kernel itself does nothing where this is 1; made for GradScaler, which reads it.
            optimizer.found_inf = (~update.applied).float()  # type: ignore[attr-defined]
            optimizer.step()
        elif update.applied:
            optimizer.step()
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        return update

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """(optimizer tensors as ``NETWORK/PARAMETER/KEY``, JSON-ready rest).

        The same for every engine and number of ranks; every rank has to call it.
        """
        tensors = {
            f"{name}/{key}": value
            for name in self.family.networks
            for key, value in self._optimizer_state(name).items()
        }
        return tensors, {name: scaler.state_dict() for name, scaler in self.scalers.items()}

    def load_state(self, tensors: dict[str, Tensor], rest: dict[str, Any]) -> None:
        """Put back what :meth:`state` gave."""
        for name in self.family.networks:
            own = {
                key.removeprefix(f"{name}/"): value
                for key, value in tensors.items()
                if key.startswith(f"{name}/")
            }
            self._load_optimizer_state(name, own)
            # a scaler's state is empty when the run does not use fp16
            if rest[name] and self.scalers[name].is_enabled():
                self.scalers[name].load_state_dict(rest[name])

    def _forward(self, phase: Phase, batch: Batch, last: bool) -> Losses:
        return phase.losses(batch)

    def _optimizer_state(self, network: str) -> dict[str, Tensor]:
        return optimizer_state(self.family.networks[network], self.optimizers[network])

    def _load_optimizer_state(self, network: str, state: dict[str, Tensor]) -> None:
        load_optimizer_state(self.family.networks[network], self.optimizers[network], state)

    def _scaled(self, phase: Phase, losses: Scalars, weight: float) -> tuple[Tensor, Tensor]:
        """The summed losses, without gradient; and what to differentiate.

        A loss that is not finite makes every gradient NaN. So each rank sees it in the sum over
        ranks, and none of them has to ask the others.
        """
        values = [loss.float() for loss in losses.values()]
        total = values[0] if len(values) == 1 else torch.stack(values).sum()
        factor = total.detach() * 0 + weight
        return total.detach(), total * self.scalers[phase.network].scale(factor)

    def _train_only(self, network: str) -> None:
        if network == self.live:
            return
        self.live = network
        for name, parameters in self.trained.items():
            for parameter in self.parameters[name]:
                parameter.requires_grad_(False)
            if name == network:
                for parameter in parameters:
                    parameter.requires_grad_(True)

    def _compiled(self, phase: Phase) -> contextlib.AbstractContextManager[Any]:
        """Where compiled networks run as they are written, if a phase needs second derivatives."""
        if self.config.compile and phase.second_order:
            eager: contextlib.AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
            return eager
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def _explained(self, phase: Phase) -> Iterator[None]:
        """Context that explains what torch says where compiled code is differentiated twice."""
        try:
            yield
        except RuntimeError as error:
            text = str(error)
            if not self.config.compile or not ("double backward" in text or "donated buf" in text):
                raise
            raise ConfigError(
                f"engine.compile: phase {phase.name} takes derivatives of derivatives, which "
                "compiled code cannot: its family has to say so (Phase(..., second_order=True)), "
                "or set engine.compile=false"
            ) from error

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}
        if self.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtypes[self.precision])


def total_norm(gradients: list[Tensor]) -> Tensor:
    """Euclidean norm of all of them together, a scalar."""
    norm: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
    return norm


def resolve_precision(precision: str, device: torch.device) -> str:
    """``auto`` as bf16 where the GPU computes it, fp16 on older GPUs, fp32 on CPU.

    Raises:
        ConfigError: fp16 was requested on a CPU.
    """
    if precision == "auto":
        if device.type != "cuda":
            return "fp32"
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if precision == "fp16" and device.type != "cuda":
        raise ConfigError(
            f"engine.precision: fp16 needs a GPU, this run is on {device.type}: use fp32 or auto"
        )
    return precision


def set_fast_paths(config: EngineConfig, device: torch.device) -> None:
    """Tell torch which of a GPU's faster ways to take, and a CPU's allocator to keep its memory.

    Has to come before the first product on the GPU: cuBLAS reads its setting once.
    """
    if device.type == "cpu":
        keep_freed_memory()
    if device.type != "cuda":
        return
    exact = config.deterministic
    torch.backends.cuda.matmul.allow_tf32 = config.tf32
    torch.backends.cudnn.allow_tf32 = config.tf32
    torch.backends.cudnn.benchmark = config.cudnn_benchmark and not exact
    torch.backends.cudnn.deterministic = exact
    if exact:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # torch warns, with its name, of an operation that has no deterministic algorithm
    torch.use_deterministic_algorithms(exact, warn_only=True)


def keep_freed_memory() -> bool:
    """Keep what a step frees for the next one, where the C library is glibc; True if it is.

    Otherwise glibc returns a step's activations to the system, which has to fill the same pages
    with zeros again for the next step.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # musl, macOS; Windows
        return False
    mallopt(_M_TRIM_THRESHOLD, _MOST_KEPT)
    # glibc before 2.35 refuses more than 32 MiB
    return any(mallopt(_M_MMAP_THRESHOLD, size) for size in (_MOST_ON_HEAP, 2**25))


def set_memory_format(network: nn.Module, config: EngineConfig, device: torch.device) -> None:
    """Lay the weights of convolutions out as a GPU reads them fastest; their values stay.

    Not where a layer would lay them out again: CUDA's group norm takes contiguous maps alone, and
    parametrizations, such as spectral norm, take a weight for a matrix.
    """
    # ZeRO joins all weights into one flat tensor, in which they have another layout again
    if device.type != "cuda" or not config.channels_last or config.name == "deepspeed":
        return
    for module in network.modules():
        if isinstance(module, nn.GroupNorm) or parametrize.is_parametrized(module):
            return
    for parameter in network.parameters():
        if parameter.dim() == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)


def build_optimizer(
    groups: Iterable[nn.Parameter] | list[dict[str, Any]],
    config: OptimConfig,
    lr: float,
    family: Family,
    network: str,
    fused: bool = False,
) -> torch.optim.Optimizer:
    """Adam over parameters or groups of them; what is frozen has no gradient and is skipped.

    Args:
        groups: of one network.
        config: for all networks, with factors for some.
        lr: of the stage.
        family: may scale lr and betas further, see ``ScalesOptimizer``.
        network: its name.
        fused: in one kernel, which ``found_inf`` keeps from changing anything.
    """
    scale = family.optimizer_scale(network) if isinstance(family, ScalesOptimizer) else 1.0
    first, second = config.betas
    kind = torch.optim.AdamW if config.name == "adamw" else torch.optim.Adam
    return kind(
        groups,
        lr=lr * scale * config.lr_scale.get(network, 1.0),
        betas=(first**scale, second**scale),
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=fused or None,
    )


def optimizer_state(network: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """State tensors as ``PARAMETER/KEY`` (``dense.weight/exp_avg``)."""
    return {
        f"{name}/{key}": value
        for name, parameter in network.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_state(
    network: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Tensor]
) -> None:
    """Put back what :func:`optimizer_state` gave.

    Raises:
        KeyError: a state tensor belongs to no parameter of the network.
    """
    parameters = dict(network.named_parameters())
    for full_name, value in state.items():
        name, _, key = full_name.rpartition("/")
        parameter = parameters[name]
        # Adam keeps its step count on the CPU, unless it is fused
        on_device = key != "step" or optimizer.defaults.get("fused")
        optimizer.state[parameter][key] = value.to(parameter.device if on_device else value.device)


def num_micros(batch: int, world_size: int, micro_batch: int | None) -> int:
    """Microbatches per step, the same on every rank, as each may take part in collectives.

    Args:
        batch: global batch.
        world_size: number of ranks.
        micro_batch: most samples of a rank in one part; None for its whole share.
    """
    share = math.ceil(batch / world_size)
    return math.ceil(share / (micro_batch or share))


def split(batch: Batch, num_parts: int, device: torch.device) -> list[tuple[Batch, int]]:
    """Cut a rank's batch into microbatches on the device; ``position`` stays on the CPU.

    Args:
        batch: as the stream gives it, of one sample at least.
        num_parts: as many as every rank makes.
        device: where tensors go.

    Returns:
        Parts and their numbers of samples, as equal as can be. Where there are more parts than
        samples, a part repeats a sample and counts 0. Each holds the whole reference batch.
    """
    size = len(batch["key"])
    reference: Batch | None = None
    if "reference_batch" in batch:
        reference = cast(Batch, _part(batch["reference_batch"], slice(None), device))
    parts = []
    for i in range(num_parts):
        first, end = size * i // num_parts, size * (i + 1) // num_parts
        part = slice(first, end) if end > first else slice(size - 1, size)
        own = {name: value for name, value in batch.items() if name != "reference_batch"}
        micro = cast(Batch, _part(own, part, device))
        if reference is not None:
            micro["reference_batch"] = reference
        parts.append((micro, end - first))
    return parts


def _part(batch: Mapping[Any, Any], part: slice, device: torch.device) -> dict[Any, Any]:
    taken: dict[Any, Any] = {}
    for name, value in batch.items():
        if isinstance(value, Mapping):
            taken[name] = _part(value, part, device)
        elif isinstance(value, torch.Tensor) and name != "position":
            taken[name] = to_device(value[part], device)
        else:
            taken[name] = value[part]
    return taken
