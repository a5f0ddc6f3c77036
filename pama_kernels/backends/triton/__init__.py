"""The Triton backend: portable GPU kernels (NVIDIA and AMD); on the CPU they run in Triton's interpreter.

`passes.py` has statistics, batch_weights, combine and loss; `solvers.py` weights, min_norm and their `_out`
forms; `advantages.py` gae and group_normalize; `simplex.py` the scalar problem as a device function.
"""

from __future__ import annotations

from .launch import INTERPRETED


def unusable(device_type: str) -> str | None:
    """Why these kernels cannot run on this type of device; None where they can."""
    if device_type == "cpu" and not INTERPRETED:
        return "runs on CPU tensors only in Triton's interpreter: set TRITON_INTERPRET=1 before Python starts"
    return None
