"""CLIP score against its formula; retrieval against a search by hand."""

from __future__ import annotations

import pytest
import torch

from dinogen.metrics.prompted import clip_score, retrieval_accuracy


def embeddings(num, size, seed):
    return torch.randn(num, size, generator=torch.Generator().manual_seed(seed))


def test_clip_score_is_the_mean_of_the_clamped_cosines():
    images, texts = 3 * embeddings(20, 4, 0), embeddings(20, 4, 1)
    cosines = [(a @ b / (a.norm() * b.norm())).item() for a, b in zip(images, texts, strict=True)]
    assert min(cosines) < 0 < max(cosines)
    expected = sum(2.5 * max(c, 0) for c in cosines) / 20
    assert clip_score(images, texts) == pytest.approx(expected, rel=1e-6)
    assert clip_score(images, images) == pytest.approx(2.5)
    assert clip_score(images, -images) == 0


def test_retrieval_is_the_share_whose_own_prompt_is_nearest():
    prompts = embeddings(6, 5, 0)
    own = torch.tensor([0, 5, 2, 2, 3, 1, 4, 0])
    images = prompts[own] + 0.8 * embeddings(8, 5, 1)
    hits = 0
    for image, number in zip(images, own.tolist(), strict=True):
        nearest = max(range(6), key=lambda p: float(image @ prompts[p] / prompts[p].norm()))
        hits += nearest == number
    assert 0 < hits < 8
    assert retrieval_accuracy(images, prompts, own) == hits / 8
    assert retrieval_accuracy(7 * prompts, prompts, torch.arange(6)) == 1
    assert retrieval_accuracy(prompts, prompts, torch.arange(6).roll(1)) == 0


def test_a_clip_that_tells_nothing_apart_finds_nothing():
    alike = torch.ones(4, 3)
    assert retrieval_accuracy(alike, alike, torch.arange(4)) == 0


def test_nothing_to_measure_is_an_error():
    with pytest.raises(ValueError, match="against texts"):
        clip_score(torch.ones(2, 3), torch.ones(3, 3))
    with pytest.raises(ValueError, match="against texts"):
        clip_score(torch.ones(0, 3), torch.ones(0, 3))
    with pytest.raises(ValueError, match="1 prompts: nothing to find"):
        retrieval_accuracy(torch.ones(2, 3), torch.ones(1, 3), torch.zeros(2, dtype=torch.int64))
