"""Copying memory (the paper's Fig. 4): ten symbols, repeated after T steps; 190 hidden units, RMSprop.

The transition's rate is lr / 32, as in the paper; the nonlinearity is modReLU, which needs a fraction of the steps of
the ReLU of the paper's script (``--nonlinearity relu``).  Run ``python experiments/copying.py``; ``--methods``,
``--length 2000`` and ``--k 1 4 16`` for more.  ``--stop`` ends a training at a tenth of the loss that is possible
without memory.
"""

from __future__ import annotations

import sys
from pathlib import Path

from common.experiment import parser, run
from common.networks import METHODS
from common.tasks import Copying


def main(arguments: list[str] | None = None) -> int:
    """Train, report, and return the exit status."""
    command = parser(
        (__doc__ or "").partition("\n")[0],
        methods=METHODS,
        chosen=["projUNN-D", "projUNN-T"],
        steps=4000,
        batch=128,
        hidden=190,
        lr=7e-4,
        unitary_lr=7e-4 / 32,
        nonlinearity="modrelu",
        out=Path("results/copying"),
    )
    command.add_argument("--length", type=int, default=1000, help="steps T to remember (default: %(default)s)")
    options = command.parse_args(arguments)
    run(options, lambda seed: Copying(options.length, options.batch, options.steps, seed), init="henaff")
    return 0


if __name__ == "__main__":
    sys.exit(main())
