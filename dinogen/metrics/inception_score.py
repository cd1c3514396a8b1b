"""Inception Score: how sure a classifier is of each image, and how varied its answers are.

Salimans et al., "Improved Techniques for Training GANs", 2016, section 4.
"""

from __future__ import annotations

import math
import statistics

from torch import Tensor

from dinogen.metrics.value import Estimate


def inception_score(logits: Tensor, num_splits: int = 10) -> Estimate:
    """exp of the mean KL divergence of p(y|x) from p(y), mean over splits of the images.

    Args:
        logits: (N, K); for comparable metric values those without bias, of the FID InceptionV3.
        num_splits: runs of N / num_splits rows; at most one for each row.

    Returns:
        The mean over splits and, as it is usually given, the standard deviation between them.

    Raises:
        ValueError: no rows.
    """
    num = len(logits)
    if not num:
        raise ValueError("no rows have no Inception Score")
    num_splits = min(num_splits, num)
    scores = []
    for split in range(num_splits):
        part = logits[split * num // num_splits : (split + 1) * num // num_splits].double()
        log_p = part.log_softmax(1)
        log_mean = log_p.logsumexp(0) - math.log(len(part))  # finite where p itself is 0
        scores.append(float((log_p.exp() * (log_p - log_mean)).sum(1).mean().exp()))
    spread = statistics.pstdev(scores) if num_splits > 1 else None
    return Estimate(statistics.fmean(scores), spread)
