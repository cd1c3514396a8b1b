"""Which stages of a config are meant by ``8`` or ``4..64``."""

from __future__ import annotations

from dinogen.config import Config
from dinogen.errors import UserError


def choose_stages(config: Config, text: str | None) -> list[int]:
    """Resolutions of the stages that ``text`` names, in their order; all of them for None.

    Args:
        config: the whole run.
        text: one resolution (``8``), or the first and the last of a range (``4..64``).

    Raises:
        UserError: no such stage, or not written like that.
    """
    sizes = [stage.resolution for stage in config.stages]
    if text is None:
        return sizes
    first, dots, last = text.partition("..")
    if not first.isdigit() or (dots and not last.isdigit()):
        raise UserError(f"stages '{text}': write one resolution, such as 8, or a range, as 4..64")
    low, high = int(first), int(last or first)
    for size in (low, high):
        if size not in sizes:
            raise UserError(f"stage {size} is not in the config: stages are {sizes}")
    if low > high:
        raise UserError(f"stages '{text}': write the smaller one first, as {high}..{low}")
    return [size for size in sizes if low <= size <= high]
