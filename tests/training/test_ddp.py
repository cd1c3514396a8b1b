"""Two gloo ranks compute what one process computes, in fade-in and in stabilise."""

import pytest
import torch

from dinogen.training.run import train
from tests.training.helpers import curve, torchrun, weights


@pytest.mark.parametrize("extra", [[], ["engine.micro_batch=3"]], ids=["whole", "accumulated"])
def test_two_ranks_equal_one(make_config, extra):
    lengths = ["stages.0.kimg=0.04", "stages.0.lr=0.002", "stages.1.lr=0.002", *extra]
    # an odd batch: the ranks get 5 and 4 images
    lengths += ["stages.0.batch=9", "stages.1.batch=9", "stages.1.kimg=0.18"]
    one, two = make_config(*lengths, run="one"), make_config(*lengths, run="two")
    train(one)
    torchrun(two, 2)
    for resolution in (4, 8):
        a, b = weights(one, resolution), weights(two, resolution)
        assert a.keys() == b.keys()
        for name in a:
            torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=2e-5, msg=name)
        for x, y in zip(curve(one, resolution), curve(two, resolution), strict=True):
            assert x == pytest.approx(y, rel=1e-4, nan_ok=True)
