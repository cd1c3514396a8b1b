"""Mean and covariance of rows as they come: running float64 sums, merged over ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dinogen import dist


@dataclass
class Moments:
    """Sums of rows and of their outer products; rows themselves are not kept.

    Attributes:
        count: rows so far.
        total: (C,) float64, their sum.
        outer: (C, C) float64, the sum of x x^T.
    """

    count: int
    total: Tensor
    outer: Tensor

    @classmethod
    def empty(cls, num_channels: int) -> Moments:
        """Of no rows yet."""
        return cls(
            0,
            torch.zeros(num_channels, dtype=torch.float64),
            torch.zeros(num_channels, num_channels, dtype=torch.float64),
        )

    @classmethod
    def of(cls, rows: Tensor, block: int = 1024) -> Moments:
        """Of rows (N, C) that are all there, in blocks of float64."""
        moments = cls.empty(rows.shape[1])
        for part in rows.split(block):
            moments.add(part)
        return moments

    def add(self, rows: Tensor) -> None:
        """Take in (N, C) rows of any float type; N may be 0."""
        exact = rows.detach().to(self.total)
        self.count += len(exact)
        self.total += exact.sum(0)
        self.outer.addmm_(exact.T, exact)

    def merged(self) -> Moments:
        """The sum over all ranks, on each of them."""
        count = dist.all_reduce_sum(torch.tensor(self.count))
        return Moments(int(count), dist.all_reduce_sum(self.total), dist.all_reduce_sum(self.outer))

    def mean(self) -> Tensor:
        """(C,) float64.

        Raises:
            ValueError: no rows.
        """
        if not self.count:
            raise ValueError("no rows have no mean")
        return self.total / self.count

    def covariance(self) -> Tensor:
        """(C, C) float64, unbiased: divided by N - 1.

        Raises:
            ValueError: fewer than two rows.
        """
        if self.count < 2:
            raise ValueError(f"{self.count} rows have no covariance: it takes at least 2")
        mean = self.mean()
        return (self.outer - self.count * torch.outer(mean, mean)) / (self.count - 1)

    def tensors(self) -> dict[str, Tensor]:
        """As tensors to be stored, such as in a safetensors file."""
        return {"count": torch.tensor(self.count), "total": self.total, "outer": self.outer}

    @classmethod
    def from_tensors(cls, stored: Mapping[str, Tensor]) -> Moments:
        """Back from :meth:`tensors`."""
        return cls(int(stored["count"]), stored["total"], stored["outer"])
