"""projUNN as a geoopt manifold: unitary and orthogonal weights with exact rank-k updates in O(k n^2)."""

from projunn_manifold import averaging, init, layers, optim
from projunn_manifold.manifold import UnitaryLowRank, UnitaryLowRankExact
from projunn_manifold.nearest import nearest_unitary
from projunn_manifold.plan import check_manifolds, manifolds_of, reattach_manifolds
from projunn_manifold.pretrained import fold, unitarize
from projunn_manifold.projunn import projunn_d, projunn_d_, projunn_t, projunn_t_

__all__ = [
    "UnitaryLowRank",
    "UnitaryLowRankExact",
    "averaging",
    "check_manifolds",
    "fold",
    "init",
    "layers",
    "manifolds_of",
    "nearest_unitary",
    "optim",
    "projunn_d",
    "projunn_d_",
    "projunn_t",
    "projunn_t_",
    "reattach_manifolds",
    "unitarize",
]
__version__ = "0.1.0"
