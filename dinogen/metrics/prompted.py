"""Pictures that were asked for by prompts: how well they fit, and whether each is told apart."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch

from dinogen.errors import ConfigError
from dinogen.metrics.clip_score import clip_score, retrieval_accuracy
from dinogen.metrics.collect import collect
from dinogen.metrics.figure import Better, Figure
from dinogen.metrics.fingerprint import Facts, fingerprint
from dinogen.metrics.judges.base import Judge
from dinogen.metrics.judges.clip import ClipJudge
from dinogen.metrics.sources import Generated

SCORE, RETRIEVAL = "clip_score", "clip_retrieval"
BETTER: dict[str, Better] = {SCORE: "higher", RETRIEVAL: "higher"}


@dataclass(frozen=True)
class Prompted:
    """Pictures made by prompts: picture i by prompt i modulo their count.

    Attributes:
        pictures: made so.
        texts: the prompts.
        guidance: how far they were exaggerated.
    """

    pictures: Generated
    texts: tuple[str, ...]
    guidance: float


def read_prompts(file: Path) -> tuple[str, ...]:
    """The lines of a text file that are not empty, each once.

    Raises:
        ConfigError: it cannot be read, or holds fewer than two.
    """
    try:
        lines = file.expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"metrics.prompts: {file} cannot be read as text: {error}") from None
    found = tuple(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if len(found) < 2:
        raise ConfigError(
            f"metrics.prompts: {file} holds {len(found)} prompts: write two or more, one per line"
        )
    return found


def prompted_figures(
    names: list[str], prompted: Prompted, judge: Judge, batch: int
) -> list[tuple[Figure, Facts]]:
    """CLIP score and retrieval accuracy; all ranks together, the same on all of them.

    Args:
        names: which of the two.
        prompted: pictures and prompts.
        judge: CLIP.
        batch: pictures made and judged at a time.
    """
    assert isinstance(judge, ClipJudge)
    num, texts = prompted.pictures.num, list(prompted.texts)
    rows = collect(prompted.pictures, [judge], {judge.info.name}, batch).seen[judge.info.name]
    assert rows.features is not None
    own = torch.arange(num) % len(texts)
    embedded = judge.texts(texts)
    values = {
        SCORE: clip_score(rows.features, embedded[own]),
        RETRIEVAL: retrieval_accuracy(rows.features, embedded, own),
    }
    digest = hashlib.sha256("\n".join(texts).encode()).hexdigest()
    asked = {"data": digest, "split": f"guidance {prompted.guidance:g}", "resize": "none"}
    facts = fingerprint(judge.info, prompted.pictures.resolution, num, asked, len(texts))
    return [
        (Figure(name, values[name], None, BETTER[name], num, len(texts), None), facts)
        for name in names
    ]
