"""Adversarial losses over logits: binary cross-entropy, Wasserstein, hinge, relativistic pairing.

Each takes logits of any shape whose first dimension is the batch, in any floating type, and gives
a float32 scalar, the mean over them. ``real`` and ``fake`` are D's logits of real and generated
pictures; larger means more real.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def bce_d(real: Tensor, fake: Tensor) -> Tensor:
    """D's cross-entropy (Goodfellow et al. 2014, equation 1), from logits."""
    return F.softplus(-real.float()).mean() + F.softplus(fake.float()).mean()


def bce_g(fake: Tensor) -> Tensor:
    """G's non-saturating loss, -log D(G(z)) (Goodfellow et al. 2014, section 3)."""
    return F.softplus(-fake.float()).mean()


def wasserstein_d(real: Tensor, fake: Tensor) -> Tensor:
    """The critic's loss (Arjovsky et al. 2017, equation 3): less is a longer distance."""
    return fake.float().mean() - real.float().mean()


def wasserstein_g(fake: Tensor) -> Tensor:
    """G's loss against a critic (Arjovsky et al. 2017, theorem 3)."""
    return -fake.float().mean()


def hinge_d(real: Tensor, fake: Tensor) -> Tensor:
    """D's hinge loss (Miyato et al. 2018, equation 16)."""
    return F.relu(1 - real.float()).mean() + F.relu(1 + fake.float()).mean()


def hinge_g(fake: Tensor) -> Tensor:
    """G's loss against a hinge D (Miyato et al. 2018, equation 17)."""
    return -fake.float().mean()


def relativistic_d(real: Tensor, fake: Tensor) -> Tensor:
    """D's loss over pairs of a real and a generated picture: the real one shall be more real.

    log(1 + exp(D(G(z)) - D(x))), the pairing loss of Jolicoeur-Martineau 2019, "The relativistic
    discriminator", as Huang et al. 2024, "The GAN is dead; long live the GAN! A Modern GAN
    Baseline" (section 2) take it, who show that it wants R1 and R2 beside it to converge. The
    logits have the same shape; each is paired with the one at its place.
    """
    return F.softplus(fake.float() - real.float()).mean()


def relativistic_g(real: Tensor, fake: Tensor) -> Tensor:
    """G's loss over the same pairs, with their order turned round (as :func:`relativistic_d`)."""
    return F.softplus(real.float() - fake.float()).mean()
