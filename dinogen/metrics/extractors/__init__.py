"""Judges: the frozen networks by whose features pictures are measured, one file each."""

from dinogen.metrics.extractors.base import Judge, JudgeInfo, NotAvailable
from dinogen.metrics.extractors.load import load_judge

__all__ = ["Judge", "JudgeInfo", "NotAvailable", "load_judge"]
