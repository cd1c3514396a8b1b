"""Random numbers derived from (seed, purpose, position), the same on any number of ranks.

Nothing in a run keeps a random state: latent noise and augmentations belong to a position in the
global order of samples, so a resumed run, or one on other ranks, draws the same numbers.
Philox 4x32-10 is counter-based (Salmon et al. 2011, "Parallel Random Numbers: As Easy as 1, 2, 3",
section 4.3): the position is part of its counter, the seed and purpose are its key.

A draw is some eighty small operations, however few numbers it has. :class:`Together` makes the
draws of a training step at once.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from functools import cache
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dinogen.transfer import to_device

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_NUM_ROUNDS = 10
# the largest words round to 1.0, which is not below 1
_BELOW_ONE = 1 - 2**-24

Key = tuple[int, int]


def derive(seed: int, purpose: str) -> Key:
    """Philox key, two words of 32 bits, of a seed and a purpose such as ``"z/G"``."""
    digest = hashlib.blake2b(f"{seed}/{purpose}".encode(), digest_size=8).digest()
    first, second = np.frombuffer(digest, dtype="<u4").tolist()
    return first, second


def normal(
    seed: int,
    purpose: str,
    positions: Tensor,
    shape: tuple[int, ...],
    device: torch.device | None = None,
) -> Tensor:
    """Standard normal noise of each position, by the transform of Box and Muller (1958).

    Args:
        seed: the run's seed.
        purpose: what the noise is for; other purposes give independent noise.
        positions: (B,) int64, indices in the global order.
        shape: shape of one position's noise.
        device: where it is computed; where the positions are unless given.

    Returns:
        (B, *shape) float32.
    """
    return _draw(Draw("normal", seed, purpose, shape, device or positions.device), positions)


def uniform(
    seed: int,
    purpose: str,
    positions: Tensor,
    shape: tuple[int, ...] = (),
    device: torch.device | None = None,
) -> Tensor:
    """Uniform numbers in (0, 1) of each position, (B, *shape) float32; as :func:`normal`."""
    return _draw(Draw("uniform", seed, purpose, shape, device or positions.device), positions)


def integers(
    seed: int,
    purpose: str,
    positions: Tensor,
    shape: tuple[int, ...] = (),
    *,
    high: int,
    device: torch.device | None = None,
) -> Tensor:
    """Uniform whole numbers from 0 to ``high - 1``, (B, *shape) int64; as :func:`normal`.

    Args:
        high: 1 to 2**31.
    """
    where = device or positions.device
    return _draw(Draw("integers", seed, purpose, shape, where, high), positions)


@contextlib.contextmanager
def torch_seed(seed: int, purpose: str) -> Iterator[None]:
    """Seed torch's CPU generator inside the block (weight init), and put it back after."""
    with torch.random.fork_rng(devices=[]):
        first, second = derive(seed, purpose)
        torch.manual_seed((first << 31 | second) & (2**63 - 1))
        yield


class Draw(NamedTuple):
    """What is drawn for each position of a batch; see :func:`normal` for the fields."""

    kind: Literal["normal", "uniform", "integers"]
    seed: int
    purpose: str
    shape: tuple[int, ...]
    device: torch.device
    high: int = 0

    @property
    def num_blocks(self) -> int:
        """Blocks of four words that a position takes."""
        return math.ceil(math.prod(self.shape) / 4)


# Numbers per position that are worth keeping for a step. A draw of more takes long enough by
# itself that it is made when it is needed, and freed after.
_MOST_KEPT = 2**15
# Blocks of four words that a CPU makes in less time than it takes to launch a GPU's kernels for
# them, which then have only a copy to wait for.
_MOST_ON_HOST = 2**15
# Steps of a kind after which a draw that none of them made is not made in advance any more.
_FORGOTTEN_AFTER = 64


class Together:
    """Makes the draws of a training step at once: those that steps of its kind made before.

    Only the speed depends on it; the numbers do not. What a step draws for
    other positions than those it began with, or for the first time, is drawn by itself.
    """

    def __init__(self) -> None:
        self._plans: dict[Hashable, _Plan] = {}

    @contextlib.contextmanager
    def step(self, kind: Hashable, batches: Sequence[Tensor]) -> Iterator[None]:
        """Context of one step.

        Args:
            kind: steps of one kind draw for the same purposes.
            batches: the positions (B,) of each microbatch; only draws for these very tensors are
                made in advance.
        """
        plan = self._plans.setdefault(kind, _Plan())
        plan.begin()
        token = _advance.set(
            {id(positions): _MadeInAdvance(positions, plan) for positions in batches}
        )
        try:
            yield
        finally:
            _advance.reset(token)


class _Plan:
    """The draws that steps of one kind make, and when one last made each of them."""

    def __init__(self) -> None:
        self._step = 0
        self._last: dict[Draw, int] = {}
        self._tables: dict[torch.device, _Tables] = {}

    def begin(self) -> None:
        """Get ready for what is drawn again and again; what has not been for long is left out."""
        self._step += 1
        recent = [d for d, last in self._last.items() if self._step - last <= _FORGOTTEN_AFTER]
        for device in {draw.device for draw in self._last}:
            own = [draw for draw in recent if draw.device == device]
            if not own:
                self._tables.pop(device, None)
            elif device not in self._tables or self._tables[device].draws != own:
                self._tables[device] = _Tables(own, device)
        self._last = {draw: self._last[draw] for draw in recent}

    def note(self, draw: Draw) -> None:
        """A draw was made."""
        self._last[draw] = self._step

    def make(self, device: torch.device, positions: Tensor) -> Mapping[Draw, Tensor]:
        """The draws of a device that a step is expected to make."""
        tables = self._tables.get(device)
        return {} if tables is None else tables.draw(positions)


class _MadeInAdvance:
    """The draws of one microbatch that are made in advance, at the first of each device."""

    def __init__(self, positions: Tensor, plan: _Plan) -> None:
        self._positions = positions
        self._plan = plan
        self._made: dict[torch.device, Mapping[Draw, Tensor]] = {}

    def take(self, draw: Draw) -> Tensor | None:
        """The numbers of a draw; None if they were not made in advance."""
        if math.prod(draw.shape) > _MOST_KEPT:
            return None
        if draw.device not in self._made:
            self._made[draw.device] = self._plan.make(draw.device, self._positions)
        self._plan.note(draw)
        return self._made[draw.device].get(draw)


_advance: ContextVar[dict[int, _MadeInAdvance] | None] = ContextVar("advance", default=None)


def _draw(draw: Draw, positions: Tensor) -> Tensor:
    advance = (_advance.get() or {}).get(id(positions))
    made = advance.take(draw) if advance is not None else None
    if made is not None:
        return made
    return _Tables([draw], draw.device).draw(positions)[draw]


class _Tables:
    """What draws that are made together have in common at all positions.

    Args:
        draws: all for one device.
        device: which.
    """

    def __init__(self, draws: Sequence[Draw], device: torch.device) -> None:
        self.draws = draws
        self._device = device
        self._parts: dict[str, tuple[list[Draw], slice]] = {}
        ordered: list[Draw] = []
        for kind in ("normal", "uniform", "integers"):
            own = [draw for draw in draws if draw.kind == kind]
            first = sum(draw.num_blocks for draw in ordered)
            ordered += own
            if own:
                end = first + sum(draw.num_blocks for draw in own)
                self._parts[kind] = own, slice(first, end)
        counts = torch.tensor([draw.num_blocks for draw in ordered])
        keys = torch.tensor([derive(draw.seed, draw.purpose) for draw in ordered])
        # one key, or one per block
        keys = keys if len(ordered) == 1 else keys.repeat_interleave(counts, 0)
        self._num_blocks = int(counts.sum())
        self._numbers = {
            torch.device("cpu"): (
                torch.cat([torch.arange(draw.num_blocks) for draw in ordered]),
                _round_keys(keys),
                torch.tensor([draw.high for draw in ordered]).repeat_interleave(counts),
            )
        }

    def draw(self, positions: Tensor) -> dict[Draw, Tensor]:
        """The numbers of each draw, (B, *shape) on the device, for positions (B,)."""
        few = positions.device.type == "cpu" and (
            len(positions) * self._num_blocks <= _MOST_ON_HOST
        )
        where = positions.device if few else self._device
        if where not in self._numbers:
            host = self._numbers[torch.device("cpu")]
            self._numbers[where] = tuple(to_device(numbers, where) for numbers in host)  # type: ignore[assignment]
        blocks, round_keys, highs = self._numbers[where]
        rows = to_device(positions, where)[:, None]
        zero = torch.zeros_like(rows)
        even, odd = _philox(blocks, zero, rows & _WORD, (rows >> 32) & _WORD, round_keys)
        found: dict[Draw, Tensor] = {}
        for kind, (draws, columns) in self._parts.items():
            words = even[:, :, columns], odd[:, :, columns]
            if kind == "normal":
                numbers = _normal(*words)
            elif kind == "uniform":
                numbers = _uniform(*words)
            else:
                numbers = _integers(*words, highs[columns])
            sizes = [4 * draw.num_blocks for draw in draws]
            parts = to_device(numbers, self._device).split(sizes, 1)
            for draw, part in zip(draws, parts, strict=True):
                found[draw] = part[:, : math.prod(draw.shape)].reshape(len(part), *draw.shape)
        return found


def philox(counter: tuple[Tensor, ...], key: Key) -> tuple[Tensor, ...]:
    """Philox 4x32-10: four words of each counter.

    Args:
        counter: four int64 tensors that broadcast, holding words of 32 bits.
        key: two words of 32 bits.

    Returns:
        Four int64 tensors of words from 0 to 2**32 - 1.
    """
    counter = torch.broadcast_tensors(*counter)
    rows = [words.reshape(1, -1) for words in counter]
    keys = to_device(_round_keys(torch.tensor([key])), rows[0].device)
    first, second, third, fourth = rows
    (a, c), (b, d) = _philox(first, second, third, fourth, keys)
    return tuple(words.view(counter[0].shape) for words in (a, b, c, d))


def _round_keys(keys: Tensor) -> Tensor:
    """Of keys (N, 2): (rounds, 2, 1, N), in the order in which :func:`_philox` needs them."""
    weyl = torch.tensor(_WEYL) * torch.arange(_NUM_ROUNDS)[:, None]
    found = (keys.T[None] + weyl[:, :, None]) & _WORD  # (rounds, 2, N)
    found[0::2] = found[0::2].flip(1)
    return found[:, :, None]


@cache
def _multipliers(device: torch.device) -> tuple[Tensor, Tensor]:
    """Both, (2, 1, 1), in the order of even and of odd rounds."""
    even = torch.tensor(_MULTIPLIERS)[:, None, None]
    return to_device(even, device), to_device(even.flip(0), device)


def _philox(
    a: Tensor, b: Tensor, c: Tensor, d: Tensor, round_keys: Tensor
) -> tuple[Tensor, Tensor]:
    """The words of counters: (the first and third, the second and fourth), each (2, B, T).

    Both multiplications of a round are one operation on two rows. A round exchanges the rows, so
    that they are back in their order after an even number of rounds.
    """
    x = torch.stack(torch.broadcast_tensors(a, c))
    products, before = torch.empty_like(x), torch.empty_like(x)
    low = d, b  # what each row is combined with
    multipliers = _multipliers(x.device)
    for number in range(_NUM_ROUNDS):
        # The product wraps around in int64, yet each of its 64 bits is right.
        torch.mul(x, multipliers[number % 2], out=products)
        torch.bitwise_right_shift(products, 32, out=x)
        x ^= round_keys[number]
        for row, words in zip(x, low, strict=True):
            row ^= words
        x &= _WORD
        low = products[1], products[0]
        products, before = before, products
    before &= _WORD
    return x, before


def _normal(even: Tensor, odd: Tensor) -> Tensor:
    """Words (2, B, T) to standard normal numbers (B, 4 T)."""
    radius = even.float().add_(0.5).mul_(2.0**-32).log_().mul_(-2).sqrt_()
    angle = odd.float().add_(0.5).mul_(2.0**-32 * (2 * math.pi))
    found = _empty_blocks(radius)
    torch.mul(radius, torch.cos(angle), out=found[:, :, 0].permute(2, 0, 1))
    torch.mul(radius, angle.sin_(), out=found[:, :, 1].permute(2, 0, 1))
    return found.flatten(1)


def _uniform(even: Tensor, odd: Tensor) -> Tensor:
    """Words (2, B, T) to numbers in (0, 1), (B, 4 T) float32."""
    found = _empty_blocks(even, torch.float32)
    found[:, :, :, 0] = even.permute(1, 2, 0)
    found[:, :, :, 1] = odd.permute(1, 2, 0)
    return found.add_(0.5).mul_(2.0**-32).clamp_(max=_BELOW_ONE).flatten(1)


def _integers(even: Tensor, odd: Tensor, highs: Tensor) -> Tensor:
    """Words (2, B, T) to numbers from 0 to highs (T,) less 1, (B, 4 T) int64."""
    found = _empty_blocks(even)
    for i, words in enumerate((even, odd)):
        torch.bitwise_right_shift(words * highs, 32, out=found[:, :, :, i].permute(2, 0, 1))
    return found.flatten(1)


def _empty_blocks(words: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Uninitialised (B, T, 2, 2) for words (2, B, T)."""
    return words.new_empty((*words.shape[1:], 2, 2), dtype=dtype)
