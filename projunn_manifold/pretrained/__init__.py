"""Trained networks made unitary: the closest unitary weights, put on manifolds, and the way back."""

from projunn_manifold.pretrained.convolutions import nearest_convolution
from projunn_manifold.pretrained.nearest import nearest_unitary
from projunn_manifold.pretrained.unitarize import fold, unitarize

__all__ = ["fold", "nearest_convolution", "nearest_unitary", "unitarize"]
