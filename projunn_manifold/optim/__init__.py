"""geoopt's optimisers with their steps made in place, and torch's optimisers constrained to manifolds."""

import projunn_manifold.optim.watch  # noqa: F401  # registers what is called before each step
from projunn_manifold.optim.constrained import constrain
from projunn_manifold.optim.in_place import RiemannianAdam, RiemannianSGD
from projunn_manifold.optim.optimizers import keepers

__all__ = ["RiemannianAdam", "RiemannianSGD", "constrain", "keepers"]
