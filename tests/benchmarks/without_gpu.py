"""Where tests can use fake CUDA tensors."""

import shutil

import pytest
import torch


def _missing() -> str:
    if torch.version.cuda is not None:
        return "fake CUDA tensors are tried with builds of torch without CUDA alone"
    return "" if shutil.which("g++") else "g++ is missing, which compiles the guard of fake CUDA"


needs_fake_cuda = pytest.mark.skipif(bool(_missing()), reason=_missing())
