"""The Triton backend: portable GPU kernels (NVIDIA and AMD); on the CPU they run in Triton's interpreter.

`passes.py` has statistics, apply and its second half apply_solved, `rules.py` solve, `simplex.py` weights,
`min_norm.py` min_norm and upgrad, `advantages.py` gae and group_normalize. They use `problem.py`, the
arguments of kernels, `tokens.py`, which loads tokens, `statistics.py`, `row_sums.py` and `reduce.py`, which
compute sums, `apply.py`, the pass over tokens, `rows.py`, the pass over sequences, `combine.py`, what both
share, and `active_set.py`, which solves quadratic problems. `ahead.py` compiles the kernels of a call in
parallel, `repeat.py` repeats the launches of earlier calls.
"""

from __future__ import annotations

from pama_kernels.backends.normalize import with_normalize

from . import advantages, passes, rules
from .ahead import compile_launches
from .launch import INTERPRETED
from .min_norm import min_norm, upgrad
from .repeat import repeatable
from .simplex import weights

statistics = repeatable(passes.empty_sums, passes.statistics)
solve = repeatable(rules.empty_solution, rules.solve)
apply = with_normalize(repeatable(passes.empty, passes.apply))
apply_solved = repeatable(lambda *_: None, passes.apply_solved)
gae = repeatable(advantages.empty_gae, advantages.gae)
group_normalize = repeatable(advantages.empty_normalized, advantages.group_normalize)

__all__ = [
    "apply",
    "apply_solved",
    "compile_launches",
    "gae",
    "group_normalize",
    "min_norm",
    "solve",
    "statistics",
    "unusable",
    "upgrad",
    "weights",
]


def unusable(device_type: str) -> str | None:
    """The reason why these kernels cannot run on this type of device, or None."""
    if device_type == "cpu" and not INTERPRETED:
        return "runs on CPU tensors only in Triton's interpreter: set TRITON_INTERPRET=1 before Python starts"
    return None
