"""Learning a random unitary matrix (the paper's Fig. 2b): complex, 4096 Gaussian samples, batches of 16, plain SGD.

The loss is ``‖(U - U*) x‖² / (2 n)``, the mean over a batch, so that at first it is 1.  Its gradient has rank 16, the
batch; k = 16 keeps all of it.  Run ``python experiments/random_unitary.py``; ``--hidden 2048`` is the
paper's, which samples columns (``--sampler column``).  ``--unitary-lr`` is in units of twice the inverse of the batch's
largest curvature.  What is called projUNN here is SGD along the tangent (``retr``, ``expmap``);
geoopt's Stiefel manifolds know no complex matrices.
"""

from __future__ import annotations

import sys
from pathlib import Path

from common.descents import METHODS
from common.experiment import parser, run
from common.matrices import RandomUnitary


def main(arguments: list[str] | None = None) -> int:
    """Train, report, and return the exit status."""
    command = parser(
        (__doc__ or "").partition("\n")[0],
        methods=METHODS,
        chosen=["projUNN-D", "projUNN-T"],
        steps=12000,
        batch=16,
        hidden=512,
        unitary_lr=1.0,
        k=[1, 2, 4, 8, 16],
        out=Path("results/random_unitary"),
    )
    command.add_argument("--sampler", default="lsi", help="see UnitaryLowRank (default: %(default)s)")
    options = command.parse_args(arguments)
    options.lr = 0.0  # there is nothing but the matrix
    run(
        options,
        lambda seed: RandomUnitary(options.hidden, options.batch, options.steps, seed),
        METHODS,
        sampler=options.sampler,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
