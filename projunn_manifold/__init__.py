"""projUNN as a geoopt manifold: unitary and orthogonal weights with exact rank-k updates in O(k n^2)."""

from projunn_manifold import averaging, init, layers, optim
from projunn_manifold.inspection.diagnosis import diagnose
from projunn_manifold.inspection.monitoring import monitor
from projunn_manifold.inspection.overview import summary
from projunn_manifold.linalg.dense import unitarity_error
from projunn_manifold.manifold.unitary import UnitaryLowRank, UnitaryLowRankExact
from projunn_manifold.moves.projunn import projunn_d, projunn_d_, projunn_t, projunn_t_
from projunn_manifold.optim.plan import check_manifolds, manifolds_of, reattach_manifolds
from projunn_manifold.optim.warming import warm_up
from projunn_manifold.pretrained.convolutions import nearest_convolution
from projunn_manifold.pretrained.nearest import nearest_unitary
from projunn_manifold.pretrained.unitarize import fold, unitarize

__all__ = [
    "UnitaryLowRank",
    "UnitaryLowRankExact",
    "averaging",
    "check_manifolds",
    "diagnose",
    "fold",
    "init",
    "layers",
    "manifolds_of",
    "monitor",
    "nearest_convolution",
    "nearest_unitary",
    "optim",
    "projunn_d",
    "projunn_d_",
    "projunn_t",
    "projunn_t_",
    "reattach_manifolds",
    "summary",
    "unitarity_error",
    "unitarize",
    "warm_up",
]
__version__ = "0.1.0"
