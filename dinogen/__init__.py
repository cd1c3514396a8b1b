"""Distributed training of image generators guided by frozen DINOv2 features.

What is listed in ``__all__`` is the public API. It is imported when it is first used, so that
``import dinogen`` itself costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dinogen.version import __version__

if TYPE_CHECKING:
    from dinogen.config import load_config
    from dinogen.evaluation.evaluate import evaluate
    from dinogen.families.base import Family, Phase
    from dinogen.features.load import load_guide
    from dinogen.runs.run import Run
    from dinogen.training.checkpointing.export import load_generator
    from dinogen.training.run import train
    from shards import open_dataset

__all__ = [
    "Family",
    "Phase",
    "Run",
    "__version__",
    "evaluate",
    "load_config",
    "load_generator",
    "load_guide",
    "open_dataset",
    "train",
]
_PLACES = {
    "Family": "dinogen.families.base",
    "Phase": "dinogen.families.base",
    "Run": "dinogen.runs.run",
    "evaluate": "dinogen.evaluation.evaluate",
    "load_config": "dinogen.config",
    "load_generator": "dinogen.training.checkpointing.export",
    "load_guide": "dinogen.features.load",
    "open_dataset": "shards",
    "train": "dinogen.training.run",
}


def __getattr__(name: str) -> Any:
    """Import a name of the public API (PEP 562)."""
    if name not in _PLACES:
        raise AttributeError(f"module 'dinogen' has no attribute {name!r}")
    found = getattr(import_module(_PLACES[name]), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
