"""Batch norm over the samples of all ranks, which reads nothing from the device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from dinogen.distributed import process_group


def sync_batch_norms(network: nn.Module) -> None:
    """Turn the batch norms inside ``network`` into ones that see all ranks; names stay."""
    for child in network.modules():
        if isinstance(child, _BatchNorm):
            child.__class__ = SyncBatchNorm


class SyncBatchNorm(_BatchNorm):
    """Batch norm whose mean and variance are those of all ranks' samples (B, C, ...).

    On a GPU by torch's kernels, differentiable once. torch's own module, which uses the same ones,
    reads from the device in each forward, in case a rank has no samples. Elsewhere it is made of
    plain operations, and differentiable to any order.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, ...) -> the same shape and type."""
        if not self.training:
            return super().forward(x)
        # the kernels cannot average statistics over all batches, which takes no momentum
        if x.is_cuda and self.momentum is not None:
            if self.num_batches_tracked is not None:
                self.num_batches_tracked += 1
            normalized: Tensor = _ByKernels.apply(x, self.weight, self.bias, self)
            return normalized
        return self.by_operations(x)

    def by_operations(self, x: Tensor) -> Tensor:
        """What :meth:`forward` does in training, on any device."""
        dims = [0, *range(2, x.dim())]
        count = x.numel() // x.shape[1]
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        variance, mean = torch.var_mean(wide, dims, correction=0)
        own = torch.cat([mean, variance, mean.new_full((1,), count)])
        # Each rank adds a row, and all have all of them: (ranks, 2 C + 1).
        rank = torch.arange(process_group.world_size(), device=x.device) == process_group.rank()
        rows = process_group.all_reduce_sum_with_gradient(rank[:, None] * own)
        means, variances = rows[:, :-1].chunk(2, 1)
        total = rows[:, -1].detach().sum()
        shares = (rows[:, -1:].detach() / total).expand_as(means)
        # not the mean of squares less the square of the mean, which would lose its digits
        mean = (shares * means).sum(0)
        variance = (shares * (variances + (means - mean).square())).sum(0)
        if self.track_running_stats:
            self._remember(mean.detach(), (variance * total / (total - 1)).detach())
        scale = torch.rsqrt(variance + self.eps)
        scale = scale if self.weight is None else scale * self.weight
        shift = -mean * scale if self.bias is None else self.bias - mean * scale
        shape = (1, -1, *[1] * (x.dim() - 2))
        return torch.addcmul(shift.view(shape), x, scale.view(shape)).to(x.dtype)

    @torch.no_grad()
    def _remember(self, mean: Tensor, variance: Tensor) -> None:
        assert self.num_batches_tracked is not None and self.running_mean is not None
        assert self.running_var is not None
        self.num_batches_tracked += 1
        if self.momentum is not None:
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance, self.momentum)
            return
        share = 1 / self.num_batches_tracked
        self.running_mean += (mean - self.running_mean) * share
        self.running_var += (variance - self.running_var) * share

    def _check_input_dim(self, x: Tensor) -> None:
        """Any number of dimensions from two."""


class _ByKernels(torch.autograd.Function):
    """Batch norm over all ranks by the kernels of ``torch.nn.SyncBatchNorm``."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, norm: SyncBatchNorm
    ) -> Tensor:
        x = _dense(x)
        num_channels, eps, momentum = x.shape[1], norm.eps, norm.momentum
        assert momentum is not None
        mean, inverse = torch.batch_norm_stats(x, eps)
        count = mean.new_full((1,), x.numel() // num_channels)
        rows = process_group.all_gather(torch.cat([mean, inverse, count])[None])
        means, inverses, counts = rows.split([num_channels, num_channels, 1], 1)
        mean, inverse = torch.batch_norm_gather_stats_with_counts(
            x,
            means,
            inverses,
            norm.running_mean,
            norm.running_var,
            momentum,
            eps,
            counts.flatten(),
        )
        ctx.save_for_backward(x, weight, mean, inverse, counts.flatten().to(torch.int32))
        return torch.batch_norm_elemt(x, weight, bias, mean, inverse, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, inverse, counts = ctx.saved_tensors
        gradient = _dense(gradient)
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        sums, products, of_weight, of_bias = torch.batch_norm_backward_reduce(
            gradient, x, mean, inverse, weight, needs_x, needs_weight, needs_bias
        )
        of_x = None
        if needs_x:
            totals = process_group.all_reduce_sum(torch.cat([sums, products]))
            sums, products = totals.chunk(2)
            of_x = torch.batch_norm_backward_elemt(
                gradient, x, mean, inverse, weight, sums, products, counts
            )
        # DDP adds up the gradients of weight and bias, as it does for all parameters
        return of_x, of_weight if needs_weight else None, of_bias if needs_bias else None, None


def _dense(x: Tensor) -> Tensor:
    """In one of the two layouts that the kernels take."""
    return x if x.is_contiguous(memory_format=torch.channels_last) else x.contiguous()
