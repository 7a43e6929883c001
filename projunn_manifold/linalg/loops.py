"""Whether compiled loops (:mod:`projunn_manifold.linalg.kernels`) can be used: numba is imported when this is asked.

The import of numba takes a tenth of a second, and the loops are compiled at their first call in each dtype, for up to
a minute; numba keeps the machine code for later processes.  The logger ``projunn_manifold`` says once that loops are
being compiled (at the level WARNING), or why there are none (INFO).

``PROJUNN_MANIFOLD_LOOPS=0`` in the environment takes the loops away: nothing is compiled, and PyTorch's products are
used throughout, with the same results to rounding.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import os
import warnings
from typing import Any

__all__ = ["NOT_YET", "SWITCH", "loops_are_usable"]

#: Stands for the loops until they are needed.
NOT_YET: Any = object()

#: The variable of the environment that takes the loops away, if it is "0".
SWITCH = "PROJUNN_MANIFOLD_LOOPS"

_WITHOUT = "steps of small rank take several times as long as with compiled loops"
_log = logging.getLogger("projunn_manifold")


@functools.cache
def loops_are_usable() -> bool:
    """Return whether there is a numba that compiles, and loops are wanted; log or warn if not."""
    if os.environ.get(SWITCH) == "0":
        _log.info("%s=0: %s", SWITCH, _WITHOUT)
        return False
    if importlib.util.find_spec("numba") is None:
        _log.info("numba is not installed: %s; python -m pip install 'projunn-manifold[fast]'", _WITHOUT)
        return False
    try:
        numba: Any = importlib.import_module("numba")
        importlib.import_module("numba.extending")
    except ImportError as error:
        warnings.warn(f"numba is installed, but cannot be used, and steps will be slower: {error}", stacklevel=2)
        return False
    if numba.config.DISABLE_JIT:
        _log.info("NUMBA_DISABLE_JIT is set: %s", _WITHOUT)
        return False
    _tell_of_compilation()
    return True


def _tell_of_compilation() -> None:
    """Log, once, that loops are being compiled; those in numba's cache are not."""
    event: Any = importlib.import_module("numba.core.event")

    class Listener(event.Listener):
        is_first = True

        def on_start(self, started: Any) -> None:
            module = started.data["dispatcher"].py_func.__module__
            if self.is_first and module.startswith("projunn_manifold."):
                self.is_first = False
                _log.warning("compiling loops, up to a minute for each dtype; numba keeps them for later processes")

        def on_end(self, ended: Any) -> None:
            """Do nothing."""

    event.register("numba:compile", Listener())
