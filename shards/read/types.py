"""Types that the parts of reading share: a batch, and what they need of a dataset."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Protocol, TypedDict

from shards.format.manifest import Manifest
from shards.format.table import SampleTable, Source
from shards.read.reader import LevelShape

# torch takes seconds to import: it is loaded with the first batch.
if TYPE_CHECKING:
    from torch import Tensor


class Batch(TypedDict, total=False):
    """What is read of B samples; a plain dict that holds what was asked for.

    Attributes:
        key: of each sample.
        position: int64 (B,), global positions of a stream, or the numbers that were read.
        image: float32 (B, 3, R, R) in [-1, 1].
        pyramid: levels of the main guide by their grid, (B, grid * grid, C) as stored.
        guides: the same of further guides, by their names.
        clip: (B, E) embeddings of the images.
        text: (B, E) embeddings of the captions, 0 where there is none.
        label: int64 (B,), if all samples have one.
    """

    key: list[str]
    position: Tensor
    image: Tensor
    pyramid: dict[int, Tensor]
    guides: dict[str, dict[int, Tensor]]
    clip: Tensor
    text: Tensor
    label: Tensor


class PackedSource(Protocol):
    """One packed dataset, with what is needed to make batches from it; see `PackedDataset`."""

    @property
    def location(self) -> str:
        """Folder or URL."""

    @property
    def manifest(self) -> Manifest:
        """What `manifest.json` says."""

    @property
    def source(self) -> Source:
        """Finds the files."""

    def num_samples(self, split: str = "train") -> int:
        """Samples in a split; 0 if there is no such split."""

    def read(self, numbers: Iterable[int], *, split: str = "train") -> Batch:
        """One batch of samples by their numbers in packed order."""

    def table(self, split: str) -> SampleTable:
        """Index of all samples of a split."""

    def level_shapes(self, levels: Sequence[int | str]) -> dict[str, LevelShape]:
        """Shapes of the payloads of some levels, by name."""


class WeightedSources(Protocol):
    """One or several packed datasets and their shares in the order; see `Dataset`."""

    @property
    def location(self) -> str:
        """Folder or URL; of a mix, all of them and their weights."""

    @property
    def manifest(self) -> Manifest:
        """What the datasets have in common."""

    @property
    def sets(self) -> Sequence[PackedSource]:
        """The packed datasets."""

    @property
    def weights(self) -> Sequence[Fraction]:
        """The share of each dataset in the order; they sum to 1."""
