"""Batch norm over ranks against torch's own, in one process; on several, see test_two_networks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dinogen.training.engines.batch_norm import SyncBatchNorm, sync_batch_norms


def both(**options):
    """torch's batch norm, and the same over ranks."""
    plain, over_ranks = (nn.Sequential(nn.BatchNorm2d(3, **options)) for _ in range(2))
    over_ranks.load_state_dict(plain.state_dict())
    sync_batch_norms(over_ranks)
    assert type(over_ranks[0]) is SyncBatchNorm
    return plain.double(), over_ranks.double()


@pytest.mark.parametrize("options", [{}, {"affine": False}, {"momentum": None}], ids=str)
def test_alone_it_is_torchs_own(options):
    plain, over_ranks = both(**options)
    for number in range(3):
        # far from 0: digits would be lost in a difference of large squares
        x = 100 + torch.randn(5, 3, 2, 4, dtype=torch.float64)
        torch.testing.assert_close(over_ranks(x), plain(x), rtol=1e-4, atol=1e-4)
        assert over_ranks[0].num_batches_tracked == number + 1
    for mine, its in zip(over_ranks.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-5, atol=1e-5)
    over_ranks.eval()
    plain.eval()
    torch.testing.assert_close(over_ranks(x), plain(x))


def test_its_first_and_second_derivatives_are_torchs():
    plain, over_ranks = both()
    x = torch.randn(4, 3, 2, 2, dtype=torch.float64)
    found = []
    for norm in (plain, over_ranks):
        leaf = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(norm(leaf).pow(3).sum(), leaf, create_graph=True)
        found.append(
            (slope, *torch.autograd.grad(slope.square().sum(), [leaf, *norm.parameters()]))
        )
    for mine, its in zip(*found, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-5)
