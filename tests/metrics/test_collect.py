"""The same is collected by 1, 2 and 3 ranks, every image once; and what of a single one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dinogen.metrics.collect import collect
from tests.metrics.ranks import BATCH, NUM, Linear, Noise, as_tensors, look, run


def test_rows_are_in_order_and_moments_are_theirs():
    found, source = look(NUM)
    assert source.read_numbers == list(range(NUM))
    images = Noise(NUM).read(list(range(NUM)))
    assert torch.equal(found.images, images[:4])
    both = Linear("both", 5, 4)(images)
    torch.testing.assert_close(found.seen["both"].features, both["features"])
    torch.testing.assert_close(found.seen["both"].logits, both["logits"])
    assert found.seen["plain"].features.shape == (NUM, 3) and found.seen["plain"].logits is None
    only = found.seen["moments"]
    assert only.features is None and only.logits is None
    expected = np.cov(Linear("moments", 4, 2)(images)["features"].double(), rowvar=False)
    np.testing.assert_allclose(only.moments.covariance(), expected, rtol=1e-5)


def test_more_images_than_there_are_are_not_asked_for():
    source = Noise(2)
    assert collect(source, [], (), 5, num_images=9).images.shape == (2, 3, 6, 6)
    assert collect(source, [], (), 5).images is None
    with pytest.raises(ValueError, match="no images"):
        collect(Noise(0), [], (), 5)


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_collect_what_one_collects(world, tmp_path):
    run(world, tmp_path)
    ranks = [load_file(tmp_path / f"{rank}.safetensors") for rank in range(world)]
    for num in (NUM, BATCH):
        read = [rank[f"{num}/read"].tolist() for rank in ranks]
        assert sum(read, []) == list(range(num))  # noqa: RUF017
        alone = as_tensors(*look(num))
        del alone["read"]
        for name, value in alone.items():
            for rank in ranks:
                found = rank[f"{num}/{name}"]
                if name.endswith(("features", "logits", "count", "images")):
                    assert torch.equal(found, value), name
                else:
                    torch.testing.assert_close(found, value, rtol=1e-12, atol=0)
    assert ranks[-1][f"{BATCH}/read"].tolist() == []
    for rank in ranks:
        assert rank["refused"].item()
        assert rank["itself"].abs() < 1e-8 * rank[f"{BATCH}/both/outer"].trace()
