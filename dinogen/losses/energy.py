"""Energy distance between sets of features, without bias."""

from __future__ import annotations

from torch import Tensor

from dinogen.losses.distances import distances, mean_of_pairs


def energy(generated: Tensor, real: Tensor) -> Tensor:
    """2 E|g - r| - E|g - g'| over pairs of different samples, mean over problems.

    Its expectation is least, E|r - r'|, if and only if the two distributions are the same
    (Szekely and Rizzo 2013, "Energy statistics: A class of statistics based on distances", eq.
    2.5): one answer for every z costs E|r - r'| more than that, if not all reals are alike. See
    :func:`energy_floor`.

    Args:
        generated: (K, N, D), N at least 2: samples of each of K problems.
        real: (K, M, D).

    Returns:
        Scalar, distances as :func:`dinogen.losses.distances.distances` scales them.
    """
    return 2 * distances(generated, real).mean() - energy_floor(generated)


def energy_floor(samples: Tensor) -> Tensor:
    """E|r - r'| over pairs of different samples (K, N, D): what a perfect generator reaches."""
    return mean_of_pairs(distances(samples, samples))
