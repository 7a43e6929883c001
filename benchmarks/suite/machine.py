"""Where a run took place and with which versions, in words that name no host and no path."""

from __future__ import annotations

import json
import os
import platform
from importlib import metadata
from pathlib import Path

import torch

PACKAGES = ("projunn_manifold", "torch", "geoopt", "pogo-torch", "geotorch", "numba", "numpy")


def versions() -> dict[str, str]:
    """Return the versions of Python and of every package that is timed; geoopt's with its commit."""
    found = {name: metadata.version(name) for name in PACKAGES}
    return {"python": platform.python_version(), **found, "geoopt": f"{found['geoopt']} ({_origin('geoopt')})"}


def machine(threads: int) -> str:
    """Describe processor, cores, memory, system and the threads in use."""
    cpuinfo = Path("/proc/cpuinfo")
    models = [line for line in cpuinfo.read_text().splitlines() if "model name" in line] if cpuinfo.exists() else []
    model = models[0].partition(":")[2].strip() if models else platform.processor() or platform.machine()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    blas = "MKL" if torch.backends.mkl.is_available() else "no MKL"
    return (
        f"{model} ({torch.backends.cpu.get_cpu_capability()}), {os.cpu_count()} cores, {memory:.0f} GiB, "
        f"{platform.system()}, {blas}, {threads} thread{'s' * (threads > 1)}"
    )


def _origin(package: str) -> str:
    """Return the commit that a package was installed from, or that it is a release."""
    record = metadata.distribution(package).read_text("direct_url.json")
    commit = json.loads(record).get("vcs_info", {}).get("commit_id") if record else None
    return f"commit {commit}" if commit else "PyPI release"
