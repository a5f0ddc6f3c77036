"""Three rewards of a text of letters, in the form of verl's reward functions."""

from __future__ import annotations

from typing import Any


def compute_score(
    data_source: str, solution_str: str, ground_truth: str, extra_info: dict[str, Any] | None = None, **_: Any
) -> dict[str, float | None]:
    length = len(solution_str)
    vowels = sum(letter in "aeiou" for letter in solution_str) / max(1, length)
    late = sum(letter > "m" for letter in solution_str) / length if length > 1 else None
    return {"score": vowels, "vowels": vowels, "short": -float(length), "late": late}
