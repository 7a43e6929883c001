"""From factors a bᴴ of a step to the next point Y = X + W F Sᴴ: pure functions, without state and without geoopt."""

from projunn_manifold.moves.projunn import projunn_d, projunn_d_, projunn_t, projunn_t_

__all__ = ["projunn_d", "projunn_d_", "projunn_t", "projunn_t_"]
