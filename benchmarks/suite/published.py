"""What is known of the original projUNN code, which cannot be installed next to current packages."""

from __future__ import annotations

from typing import Any

COST = "O(k (n² + n k + k²))"
SOURCE = (
    "cost: Kiani et al. 2022, Theorems 4.2 and 4.4; times: facebookresearch/projUNN at c2b03eb, repaired, measured "
    "earlier by this project on one core, float32, k = 1, not in this run"
)
ORIGINAL: list[dict[str, Any]] = [
    {"subject": "original projUNN D", "cost": COST, "ratio": {"512": 23, "1024": 41, "2048": 47, "4096": 36}},
    {"subject": "original projUNN T", "cost": COST, "ratio": {"512": 18, "1024": 12, "2048": 31, "4096": 23}},
]
