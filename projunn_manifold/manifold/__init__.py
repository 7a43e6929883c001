"""geoopt's names for points, tangent vectors and moves, and what a manifold remembers between steps."""

from projunn_manifold.manifold.unitary import UnitaryLowRank, UnitaryLowRankExact

__all__ = ["UnitaryLowRank", "UnitaryLowRankExact"]
