"""A reward function for verl with three objectives: verl logs `score`, PAMA combines the others."""

from __future__ import annotations

from typing import Any


def compute_score(
    data_source: str, solution_str: str, ground_truth: str, extra_info: dict[str, Any] | None = None
) -> dict[str, float | None]:
    """One entry per objective; None where an objective does not apply to this sample."""
    words = solution_str.split()
    rewards = {
        "correct": float(ground_truth in solution_str) if ground_truth else None,
        "concise": max(0.0, 1.0 - len(words) / 200),
        "polite": float(any(word.strip(".,!").lower() in ("please", "thanks") for word in words)),
    }
    return {"score": sum(value or 0.0 for value in rewards.values()), **rewards}
