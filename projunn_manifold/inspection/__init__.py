"""What a model's unitary weights are, what their steps do, and how much rank they need."""

from projunn_manifold.inspection.diagnosis import diagnose
from projunn_manifold.inspection.monitoring import monitor
from projunn_manifold.inspection.overview import summary

__all__ = ["diagnose", "monitor", "summary"]
