"""A latent per training picture, learnt with the generator, kept white so that it can be sampled.

Bojanowski et al. 2018, "Optimizing the Latent Space of Generative Networks" (GLO), equation 2: min
over latents and generator alike. The paper fits a Gaussian to the latents to sample from (section
3.3); here the latents are seen through the fit, so its samples are standard normal at any time.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

# A direction in which all rows agree would be blown up without end.
_LEAST_DEVIATION = 1e-3


class LatentTable(nn.Module):
    """Rows u; the latent of row i is L^-1 (u_i - mean), with L L' the covariance of all rows.

    Mean and L count as constants in the gradient. Their size means nothing then, only how fast
    rows move for it: with Adam, whose steps have the size of the learning rate, rows of deviation
    1 / ``rate`` move ``rate`` times as fast as weights of size 1.

    Args:
        num_latents: rows, more than ``z_dim``.
        z_dim: size of a latent.
        rate: of learning, over that of the other parameters.
    """

    def __init__(self, num_latents: int, z_dim: int, rate: float = 10.0) -> None:
        super().__init__()
        if num_latents <= z_dim:
            raise ValueError(
                f"{num_latents} latents of {z_dim} numbers: a Gaussian in {z_dim} dimensions needs "
                "more points than that"
            )
        self.least = _LEAST_DEVIATION / rate
        self.rows = nn.Parameter(torch.randn(num_latents, z_dim) / rate)

    def forward(self, numbers: Tensor) -> Tensor:
        """Latents (B, z_dim) float32 of rows ``numbers`` (B,); all: mean 0, covariance 1."""
        with torch.autocast(self.rows.device.type, enabled=False):
            rows = self.rows.float()
            with torch.no_grad():
                mean = rows.mean(0)
                covariance = (rows - mean).T @ (rows - mean) / len(rows)
                covariance.diagonal().add_(self.least**2)
                L = torch.linalg.cholesky(covariance)
            # Looked up by embedding: its gradient is summed in one order on a GPU as well.
            own = nn.functional.embedding(numbers, rows) - mean
            z: Tensor = torch.linalg.solve_triangular(L, own.T, upper=False).T
            return z
