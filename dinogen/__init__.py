"""Distributed training of image generators guided by frozen DINOv2 features.

``__all__`` lists the public API. Each name is imported on first use, so ``import dinogen`` is fast.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dinogen.version import __version__

if TYPE_CHECKING:
    from dinogen.config import load_config
    from dinogen.evaluation.evaluate import evaluate, evaluate_folder
    from dinogen.families.base import Family, Phase
    from dinogen.features.load import load_guide
    from dinogen.guidance import objectives
    from dinogen.guidance.guides import GuideSet
    from dinogen.runs.run import Run
    from dinogen.training.checkpointing.export import load_generator
    from dinogen.training.run import train
    from shards import open_dataset

__all__ = [
    "Family",
    "GuideSet",
    "Phase",
    "Run",
    "__version__",
    "evaluate",
    "evaluate_folder",
    "load_config",
    "load_generator",
    "load_guide",
    "objectives",
    "open_dataset",
    "train",
]
# The module of each name.
_PLACES = {
    "Family": "dinogen.families.base",
    "GuideSet": "dinogen.guidance.guides",
    "Phase": "dinogen.families.base",
    "Run": "dinogen.runs.run",
    "evaluate": "dinogen.evaluation.evaluate",
    "evaluate_folder": "dinogen.evaluation.evaluate",
    "load_config": "dinogen.config",
    "load_generator": "dinogen.training.checkpointing.export",
    "load_guide": "dinogen.features.load",
    "open_dataset": "shards",
    "train": "dinogen.training.run",
}
_MODULES = {"objectives": "dinogen.guidance.objectives"}


def __getattr__(name: str) -> Any:
    """Import a name of the public API (PEP 562)."""
    if name in _MODULES:
        found = import_module(_MODULES[name])
    elif name in _PLACES:
        found = getattr(import_module(_PLACES[name]), name)
    else:
        raise AttributeError(f"module 'dinogen' has no attribute {name!r}")
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
