"""Adding (the paper's Fig. 3): the sum of two marked numbers among T; ReLU, 170 hidden units, RMSprop.

The transition starts at the identity.  Run ``python experiments/adding.py``; ``--length 750``, ``--methods`` and
``--k 1 4 16`` for more.  ``--stop`` ends a training at a mean squared error of 0.01.
"""

from __future__ import annotations

import sys
from pathlib import Path

from common.experiment import parser, run
from common.networks import METHODS
from common.tasks import Adding


def main(arguments: list[str] | None = None) -> int:
    """Train, report, and return the exit status."""
    command = parser(
        (__doc__ or "").partition("\n")[0],
        methods=METHODS,
        chosen=["projUNN-D", "projUNN-T"],
        steps=20000,
        batch=50,
        hidden=170,
        lr=1e-3,
        nonlinearity="relu",
        unitary_lr=1e-3 / 32,
        out=Path("results/adding"),
    )
    command.add_argument("--length", type=int, default=200, help="numbers T in a sequence (default: %(default)s)")
    options = command.parse_args(arguments)
    run(options, lambda seed: Adding(options.length, options.batch, options.steps, seed), init="identity")
    return 0


if __name__ == "__main__":
    sys.exit(main())
