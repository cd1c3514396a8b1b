"""What has to stand beside a metric value that was measured on few images."""

from __future__ import annotations

FEW = 1000


def caution_of(
    num_samples: int | None, num_reference: int | None, num_dims: int | None = None
) -> str | None:
    """Why a metric value is to be read with care; None if nothing speaks against it.

    Args:
        num_samples: generated images behind it; None if that is not known.
        num_reference: real images behind it; None if it needs none.
        num_dims: dimensions of the features whose covariance it reads; None for other metric
            values.
    """
    known = ((num_samples, "generated"), (num_reference, "real"))
    counts = [(num, what) for num, what in known if num is not None]
    few = [f"{num:,} {what}" for num, what in counts if num < FEW]
    said = []
    if few:
        said.append(f"from only {' and '.join(few)} images (fewer than {FEW:,})")
    short = [f"{num:,} {what}" for num, what in counts if num_dims is not None and num < num_dims]
    if short:
        said.append(
            f"from fewer images ({' and '.join(short)}) than its features have dimensions "
            f"({num_dims:,}): it is too high"
        )
    return "; ".join(said) or None
