"""One command that proves the package on the hardware at hand: ``python -m projunn_manifold.selftest``."""
