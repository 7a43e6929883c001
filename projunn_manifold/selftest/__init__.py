"""A command that checks the package on the hardware at hand: ``python -m projunn_manifold.selftest``."""
