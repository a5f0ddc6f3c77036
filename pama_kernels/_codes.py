"""What Python and the kernels agree on: codes of the weighting, and the layout of the statistics buffer.

The native side of both is in `csrc/cpu/problem.hpp` and `csrc/core/statistics.hpp`.
"""

from __future__ import annotations

GIVEN, BATCH, GRAM, SEQUENCE, TOKEN = range(5)

# Per objective, (N,) each; then the token count and the sum of k3; then, on request, (N, N) each.
FIELDS = (
    "count",
    "bound_sum",
    "bound_square_sum",
    "logprob_sum",
    "surrogate_sum",
    "advantage_sum",
    "advantage_square_sum",
    "positive_count",
    "clipped_count",
)
TOTALS = ("token_count", "kl_sum")
PAIRS = (
    "bound_product",
    "advantage_product",
    "pair_count",
    "pair_advantage",
    "pair_advantage_square",
)


def statistics_size(objectives: int, pairs: bool) -> int:
    """Numbers in the buffer."""
    n = objectives
    return len(FIELDS) * n + len(TOTALS) + (len(PAIRS) * n * n if pairs else 0)
