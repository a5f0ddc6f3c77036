"""The Triton backend: portable GPU kernels (NVIDIA and AMD); on the CPU they run in Triton's interpreter.

`statistics.py` has statistics and batch_weights, `passes.py` combine and loss, `solvers.py` weights, min_norm
and their `_out` forms, `advantages.py` gae and group_normalize; `simplex.py` solves the scalar problem on the
device.
"""

from __future__ import annotations

from .advantages import gae, group_normalize
from .launch import INTERPRETED
from .passes import combine, loss
from .solvers import min_norm, min_norm_out, weights, weights_out
from .statistics import batch_weights, statistics

__all__ = [
    "batch_weights",
    "combine",
    "gae",
    "group_normalize",
    "loss",
    "min_norm",
    "min_norm_out",
    "statistics",
    "unusable",
    "weights",
    "weights_out",
]


def unusable(device_type: str) -> str | None:
    """Why these kernels cannot run on this type of device; None where they can."""
    if device_type == "cpu" and not INTERPRETED:
        return "runs on CPU tensors only in Triton's interpreter: set TRITON_INTERPRET=1 before Python starts"
    return None
