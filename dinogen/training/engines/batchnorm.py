"""Batch norm over the batch of all ranks, so that its statistics do not depend on their number."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dinogen.distributed import process_group


def sync_batch_norms(network: nn.Module, device: torch.device) -> None:
    """Turn the batch norms inside ``network`` into ones that see all ranks; names stay.

    On GPUs torch's own ``nn.SyncBatchNorm``, which knows no CPU.
    """
    for module in network.modules():
        for name, child in module.named_children():
            if isinstance(child, _BatchNorm) and not isinstance(child, nn.SyncBatchNorm):
                if device.type == "cuda":
                    setattr(module, name, nn.SyncBatchNorm.convert_sync_batchnorm(child))
                else:
                    child.__class__ = CpuSyncBatchNorm


class CpuSyncBatchNorm(_BatchNorm):
    """Batch norm whose mean and variance are those of all ranks' samples (B, C, ...)."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, ...) -> the same shape."""
        if not self.training:
            return super().forward(x)
        places = [0, *range(2, x.dim())]
        shape = (1, -1, *[1] * (x.dim() - 2))
        count = process_group.all_reduce_sum(torch.tensor(x.numel() / x.shape[1]))
        mean = process_group.all_reduce_sum_with_gradient(x.sum(places)) / count
        # a second pass: the mean of squares less the square of the mean loses its digits
        x = x - mean.view(shape)
        variance = process_group.all_reduce_sum_with_gradient(x.square().sum(places)) / count
        if self.track_running_stats:
            self._remember(mean.detach(), (variance * count / (count - 1)).detach())
        x = x * torch.rsqrt(variance.view(shape) + self.eps)
        if self.affine:
            x = x * self.weight.view(shape) + self.bias.view(shape)
        return x

    @torch.no_grad()
    def _remember(self, mean: Tensor, variance: Tensor) -> None:
        assert self.num_batches_tracked is not None and self.running_mean is not None
        assert self.running_var is not None
        self.num_batches_tracked += 1
        share = self.momentum
        if share is None:
            share = 1.0 / float(self.num_batches_tracked)
        self.running_mean.lerp_(mean, share)
        self.running_var.lerp_(variance, share)

    def _check_input_dim(self, x: Tensor) -> None:
        """Any number of dimensions from two."""
