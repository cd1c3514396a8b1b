"""The DeepSpeed engine: optimizer state (ZeRO 1), and gradients too (ZeRO 2), are sharded."""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from torch import Tensor, nn

from dinogen.batch import Batch, Losses, Scalars
from dinogen.config import Config, ConfigError, StageConfig
from dinogen.distributed import process_group
from dinogen.families.base import Family, Phase
from dinogen.training.engines.base import (
    SingleEngine,
    Update,
    build_optimizer,
    load_optimizer_state,
    num_micros,
    optimizer_state,
    total_norm,
)

log = logging.getLogger(__name__)

# Elements reduced and gathered at once; DeepSpeed allocates buffers of this size per network.
_BUCKET = 1 << 24


def deepspeed_config(config: Config, stage: StageConfig, world_size: int) -> dict[str, Any]:
    """What DeepSpeed is told about one stage, JSON-ready.

    Weights stay float32 in every engine, so that moving averages and checkpoints mean the same in
    all of them: bf16 and fp16 are torch's autocast around the losses, and gradients are averaged in
    float32. The optimizer is ours, DeepSpeed shards it.

    Args:
        config: the whole run.
        stage: whose batch it is.
        world_size: number of ranks.
    """
    parts = num_micros(stage.batch, world_size, config.engine.micro_batch)
    share = math.ceil(stage.batch / world_size)
    return {
        # Of the largest share; DeepSpeed only counts with it, losses are weighed by us.
        "train_micro_batch_size_per_gpu": math.ceil(share / parts),
        "gradient_accumulation_steps": parts,
        # Left out it would be 1.0, which is not "no clipping".
        "gradient_clipping": config.engine.clip_grad_norm or 0.0,
        "zero_optimization": {
            "stage": config.engine.zero,
            "overlap_comm": False,
            "contiguous_gradients": True,
            "round_robin_gradients": False,
            "reduce_bucket_size": _BUCKET,
            "allgather_bucket_size": _BUCKET,
        },
        "communication_data_type": "fp32",
        "bf16": {"enabled": False},
        "fp16": {"enabled": False},
        "wall_clock_breakdown": False,
    }


class DeepSpeedEngine(SingleEngine):
    """One DeepSpeed engine per network; losses are computed on the bare modules.

    Optimizer state is kept by parameter name, as in the other engines, whenever the sharding
    changes: at the end of a fade-in, in checkpoints, on another number of ranks.
    """

    def __init__(self, config: Config, family: Family, lr: float, device: torch.device) -> None:
        _set_up(device)
        self.engines: dict[str, Any] = {}
        self.kept: dict[str, dict[str, Tensor]] = {name: {} for name in family.networks}
        self.layout: dict[str, list[list[str]]] = {}
        self.lr = lr
        self.optim = config.optim
        self.settings = deepspeed_config(config, family.stage, process_group.world_size())
        super().__init__(config, family, lr, device)
        # A number that goes through the scaler for the gradients that DeepSpeed has sharded.
        self.norm = nn.Parameter(torch.zeros((), device=device))
        self.norms = torch.optim.SGD([self.norm])

    def prepare(self) -> None:
        """Shard the optimizer state of what trains now."""
        import deepspeed

        for name in self.engines:
            self.kept[name] |= self._gather(name)
        for engine in self.engines.values():
            engine.destroy()
        super().prepare()
        for name, network in self.family.networks.items():
            self._train_only(name)
            groups = self._groups(name)
            self.optimizers[name] = build_optimizer(groups, self.optim, self.lr, self.family, name)
            self.engines[name], *_ = deepspeed.initialize(
                model=network,
                optimizer=self.optimizers[name],
                config=self.settings,
                dist_init_required=False,
            )
            self._scatter(name)

    def losses(self, phase: Phase, batch: Batch, last: bool) -> Losses:
        """As in one process; what DeepSpeed prepares in its own forward is prepared here."""
        engine = self.engines[phase.network]
        engine.set_gradient_accumulation_boundary(last)
        if self.config.zero:
            engine.optimizer.clear_backward_seen_flag()
        return super().losses(phase, batch, last)

    def backward(self, phase: Phase, losses: Scalars, weight: float) -> Tensor:
        """DeepSpeed divides by the number of ranks; the weight is a share of the global batch."""
        engine = self.engines[phase.network]
        total, scaled = self._scaled(phase, losses, weight * process_group.world_size())
        if self.config.zero:
            engine.optimizer.override_loss_scale(1.0)  # ours scales the loss, once
        engine.backward(scaled, scale_wrt_gas=False)
        return total

    def step(self, phase: Phase) -> Update:
        """One optimizer step, unless a gradient or loss is not finite on any rank.

        DeepSpeed itself reads from the device here.
        """
        engine, scaler = self.engines[phase.network], self.scalers[phase.network]
        update = Update(self._norm(phase.network))
        applied = not process_group.any_rank(not update.applied)
        if self.config.zero:
            engine.optimizer.override_loss_scale(scaler.get_scale())  # the step divides by it
            engine.optimizer.check_grad_overflow = True
            engine.optimizer.check_overflow = _OverflowCheck(engine.optimizer, applied)
        if self.config.zero or applied:
            engine.step()
        engine.zero_grad()
        scaler.update()
        return update if applied else Update(torch.full_like(update.grad_norm, math.nan))

    def _norm(self, network: str) -> Tensor:
        """Total norm of the gradient, unscaled; infinite or NaN if it cannot be used."""
        scaler = self.scalers[network]
        if not self.config.zero:
            scaler.unscale_(self.optimizers[network])
            gradients = [p.grad for p in self.trained[network] if p.grad is not None]
            return total_norm(gradients)
        norm = self.engines[network].optimizer.scaled_global_norm().to(self.device)
        # ZeRO says -1 of what is not finite
        self.norm.grad = torch.where(norm < 0, torch.inf, norm).float().reshape(())
        scaler.unscale_(self.norms)
        return self.norm.grad

    def _groups(self, network: str) -> list[dict[str, Any]]:
        """What trains now, in groups that have made as many steps: ZeRO counts them per group."""
        names = {p: n for n, p in self.family.networks[network].named_parameters()}
        groups: dict[float, list[nn.Parameter]] = {}
        for parameter in self.trained[network]:
            step = self.kept[network].get(f"{names[parameter]}/step", torch.zeros(()))
            groups.setdefault(float(step), []).append(parameter)
        self.layout[network] = [[names[p] for p in group] for group in groups.values()]
        return [{"params": group} for group in groups.values()]

    def _scatter(self, network: str) -> None:
        """Hand the kept optimizer state of what trains now to DeepSpeed."""
        kept = self.kept[network]
        live = {name for names in self.layout[network] for name in names}
        own = {key: kept.pop(key) for key in list(kept) if key.rpartition("/")[0] in live}
        optimizer = self.optimizers[network]
        if not self.config.zero:
            load_optimizer_state(self.family.networks[network], optimizer, own)
            return
        zero = self.engines[network].optimizer
        for i, names in enumerate(self.layout[network]):
            mine = zero.single_partition_of_fp32_groups[i]
            whole = zero.bit16_groups_flat[i]
            for key in {
                full.rpartition("/")[2] for full in own if full.rpartition("/")[0] in names
            }:
                values = [own[f"{name}/{key}"] for name in names]
                if key == "step":
                    optimizer.state[mine][key] = values[0].clone()
                    continue
                flat = torch.zeros(whole.shape, dtype=mine.dtype)
                joined = torch.cat([value.flatten() for value in values])
                flat[: len(joined)] = joined
                part = flat.view(process_group.world_size(), -1)[process_group.rank()]
                optimizer.state[mine][key] = part.to(mine.device, copy=True)

    def _gather(self, network: str) -> dict[str, Tensor]:
        """Optimizer state of what trains now, whole, by parameter name; on every rank's CPU."""
        module, optimizer = self.family.networks[network], self.optimizers[network]
        if not self.config.zero:
            return optimizer_state(module, optimizer)
        shapes = {name: parameter.shape for name, parameter in module.named_parameters()}
        zero = self.engines[network].optimizer
        found: dict[str, Tensor] = {}
        for i, names in enumerate(self.layout[network]):
            mine = zero.single_partition_of_fp32_groups[i]
            # sorted, for it may have been filled in another order on each rank
            for key, value in sorted(optimizer.state.get(mine, {}).items()):
                if key == "step":
                    found |= {f"{name}/{key}": value.clone() for name in names}
                    continue
                flat = process_group.all_gather(value).cpu()
                sizes = [shapes[name].numel() for name in names]
                parts = flat[: sum(sizes)].split(sizes)
                for name, part in zip(names, parts, strict=True):
                    found[f"{name}/{key}"] = part.view(shapes[name]).clone()
        return found

    def _optimizer_state(self, network: str) -> dict[str, Tensor]:
        live = self._gather(network) if network in self.engines else {}
        return self.kept[network] | live

    def _load_optimizer_state(self, network: str, state: dict[str, Tensor]) -> None:
        self.kept[network] = state
        if network in self.engines:
            self._scatter(network)


class _OverflowCheck:
    """Takes the place of DeepSpeed's own search for overflow: ranks have agreed on the step."""

    def __init__(self, optimizer: Any, applied: bool) -> None:
        self.optimizer = optimizer
        self.applied = applied

    def __call__(self, partition_gradients: bool = True) -> None:
        self.optimizer.overflow = not self.applied


def _set_up(device: torch.device) -> None:
    """Import DeepSpeed without what it would compile, and give it a process group.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import deepspeed
    except ImportError as error:
        raise ConfigError(
            f"engine.name: deepspeed cannot be imported ({error}): pip install 'dinogen[deepspeed]'"
        ) from error
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if device.type == "cpu":
        # Compiling it takes minutes, and a lock file left by a killed run then hangs all others.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    process_group.init(alone=True)
    deepspeed.init_distributed(dist_backend="nccl" if device.type == "cuda" else "gloo")
