"""Layers whose weights stay unitary: linear maps, recurrent networks, convolutions, with the conventions of torch.nn.

A layer owns its manifold as a submodule, so that ``state_dict`` keeps the manifold's state, and puts its weights back
on it where PyTorch replaces them (``load_state_dict(assign=True)``, ``to_empty``).  It loads the ``state_dict`` of
torch's layer of its kind, too, if the weights are on the manifold; one that is not is a ValueError.
"""

from projunn_manifold.layers.conv import (
    OrthogonalConv1d,
    OrthogonalConv2d,
    OrthogonalConv3d,
    UnitaryConv1d,
    UnitaryConv2d,
    UnitaryConv3d,
)
from projunn_manifold.layers.existing import param_groups, plain_, unitary_
from projunn_manifold.layers.exponential import (
    ExpConv1d,
    ExpConv2d,
    UnitaryConvRNN,
    UnitaryConvRNNCell,
    conv_exponential,
    squash,
)
from projunn_manifold.layers.linear import UnitaryLinear
from projunn_manifold.layers.modrelu import ModReLU
from projunn_manifold.layers.rnn import UnitaryRNN, UnitaryRNNCell

__all__ = [
    "ExpConv1d",
    "ExpConv2d",
    "ModReLU",
    "OrthogonalConv1d",
    "OrthogonalConv2d",
    "OrthogonalConv3d",
    "UnitaryConv1d",
    "UnitaryConv2d",
    "UnitaryConv3d",
    "UnitaryConvRNN",
    "UnitaryConvRNNCell",
    "UnitaryLinear",
    "UnitaryRNN",
    "UnitaryRNNCell",
    "conv_exponential",
    "param_groups",
    "plain_",
    "squash",
    "unitary_",
]
