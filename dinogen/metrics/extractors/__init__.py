"""Feature extractors: the frozen networks by whose features images are measured, one file each."""

from dinogen.metrics.extractors.base import ExtractorInfo, FeatureExtractor, NotAvailable
from dinogen.metrics.extractors.load import load_extractor

__all__ = ["ExtractorInfo", "FeatureExtractor", "NotAvailable", "load_extractor"]
