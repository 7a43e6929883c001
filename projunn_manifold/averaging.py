"""Averages of weights (EMA, SWA) that stay on the manifold."""

from __future__ import annotations

import torch
from geoopt import ManifoldTensor

from projunn_manifold.manifold.parameters import is_dtensor, manifold_of
from projunn_manifold.manifold.unitary import unitary_of

__all__ = ["AveragedModel"]


class AveragedModel(torch.optim.swa_utils.AveragedModel):
    r"""``torch.optim.swa_utils.AveragedModel`` whose parameters on manifolds are projected after each average.

    An average of unitary matrices is not unitary.  Its polar factor, the closest unitary, is also the unitary Y with
    the least mean of :math:`\|Y - X_i\|_F^2` over the matrices averaged (the chordal mean).  At every update the
    running average is replaced by its polar factor.  (The mean of X and -X is zero, to which no unitary is closest;
    an arbitrary one is returned.)

    Accepts the arguments of torch's class, including any ``avg_fn`` or ``multi_avg_fn``.  An update costs
    :math:`O(nm^2)` for each parameter on a manifold: average every few steps where n is large.

    Examples
    --------
    >>> import geoopt, torch
    >>> from projunn_manifold import UnitaryLowRank
    >>> from projunn_manifold.averaging import AveragedModel
    >>> manifold = UnitaryLowRank(k=1)
    >>> model = torch.nn.Linear(8, 8)
    >>> model.weight = geoopt.ManifoldParameter(manifold.random(8, 8), manifold=manifold)
    >>> averaged = AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.99))
    >>> for _ in range(3):
    ...     _ = manifold.step_(model.weight, torch.randn(8, 8), lr=0.1)
    ...     averaged.update_parameters(model)
    >>> manifold.check_point_on_manifold(averaged.module.weight.detach())
    True
    """

    @torch.no_grad()
    def update_parameters(self, model: torch.nn.Module) -> None:
        """Average, project every parameter that is on a manifold, and take the larger count of its gradients.

        Raises
        ------
        NotImplementedError
            Sharded parameters on manifolds: an average of shards cannot be projected.
        """
        pairs = list(zip(self.module.parameters(), model.parameters(), strict=True))
        manifolds = {id(unitary_of(own)): (unitary_of(own), unitary_of(given)) for own, given in pairs}
        if any(is_dtensor(p) and manifold_of(p) is not None for pair in pairs for p in pair):
            raise NotImplementedError("an average of shards cannot be projected: average the whole matrices")
        super().update_parameters(model)
        for own, _ in pairs:
            if isinstance(own, ManifoldTensor):
                own.proj_()
        for mine, theirs in manifolds.values():
            if mine is not None and theirs is not None and mine is not theirs:
                mine.take_largest_state(theirs)
