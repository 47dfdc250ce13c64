"""Frozen pre-trained networks: what they make of samples, computed once and kept."""

from cl_bench.features.backbone import Backbone, ImageBackbone, TextBackbone
from cl_bench.features.base import BaseTraining
from cl_bench.features.store import FeatureStore
from cl_bench.features.stream import FeatureStream

__all__ = [
    "Backbone",
    "BaseTraining",
    "FeatureStore",
    "FeatureStream",
    "ImageBackbone",
    "TextBackbone",
]
