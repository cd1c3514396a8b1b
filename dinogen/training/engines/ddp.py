"""The DDP engine: many processes, whose gradients are averaged while the backward runs."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dinogen.batch import Batch, Losses, Scalars
from dinogen.distributed import process_group
from dinogen.families.base import Phase
from dinogen.training.engines.base import SingleEngine


class _PhaseLosses(nn.Module):
    """A trained network whose forward is a phase's whole loss computation.

    DDP needs one forward for one backward; families may call their networks in any way in between.
    It lists the last parameters first, whose gradients come first.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.backwards = nn.ParameterList(reversed(list(network.parameters())))
        self.network = network

    def forward(self, phase: Phase, batch: Batch) -> Losses:
        return phase.losses(batch)


class DdpEngine(SingleEngine):
    """Many processes: gradients are averaged while the backward runs (Li et al. 2020)."""

    wrapped: dict[str, DistributedDataParallel]

    def prepare(self) -> None:
        """As in one process; the buckets hold only what trains now."""
        super().prepare()
        self.wrapped = {}
        for name, network in self.family.networks.items():
            self._train_only(name)
            wrapped = self.wrapped[name] = DistributedDataParallel(
                _PhaseLosses(network), gradient_as_bucket_view=True
            )
            # Not as an argument: torch 2.13 has another name for it.
            wrapped.broadcast_buffers = False
            # DDP would put the buckets into another order after the first step of each start, and
            # with three ranks or more sums are rounded as they lie: this order is there at once.
            wrapped.reducer._push_all_rebuilt_params()

    def backward(self, phase: Phase, losses: Scalars, weight: float) -> Tensor:
        """DDP divides by the number of ranks; the weight already is a share of the global batch."""
        return super().backward(phase, losses, weight * process_group.world_size())

    def _forward(self, phase: Phase, batch: Batch, last: bool) -> Losses:
        wrapped = self.wrapped[phase.network]
        # no_sync() as a flag: it has to hold from the forward until after the backward
        wrapped.require_backward_grad_sync = last
        result: Losses = wrapped(phase, batch)
        return result
