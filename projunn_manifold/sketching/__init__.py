"""From a gradient G to rank-k factors (a, b) with G ≈ a bᴴ, and the tensor that carries factors through optimisers."""

from projunn_manifold.sketching.factored_tensor import FactoredTensor
from projunn_manifold.sketching.lowrank import LowRank
from projunn_manifold.sketching.samplers import SAMPLERS, Column, Sampler, Subspace, svd

__all__ = ["SAMPLERS", "Column", "FactoredTensor", "LowRank", "Sampler", "Subspace", "svd"]
