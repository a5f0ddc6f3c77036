"""Reads the logged metrics of a training run as series, from TRL's trainer state, TensorBoard's events or
Stable-Baselines3's CSV."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from .read import number, read_table

Series = list[tuple[float, float]]  # (step, value), in the order of steps; a value may be NaN

STATE, PROGRESS, EVENTS = "trainer_state.json", "progress.csv", "events.out.tfevents*"
# The adapters' names. TensorBoard has "train/" before those of TRL.
REWARD = re.compile(r"(?:train/)?rewards/(.+)/mean|rollout/reward/(.+)")
BY_REWARD = re.compile(r"(?:train/)?pama/(weight|covariance|signal)/(.+)")
CONFLICT = re.compile(r"(?:train/)?pama/conflict/(.+)")


class Run(NamedTuple):
    """Series by reward, and by pair ("a~b", or "worst" beyond eight rewards)."""

    source: str
    unit: str  # of the steps
    reward: dict[str, Series]
    weight: dict[str, Series]
    covariance: dict[str, Series]
    signal: dict[str, Series]
    conflict: dict[str, Series]

    @property
    def names(self) -> list[str]:
        return list(dict.fromkeys([*self.weight, *self.covariance, *self.reward]))


def read_run(path: Path) -> Run:
    """A file, or the folder of a run or checkpoint: its newest trainer state, else progress.csv, else events.

    Raises:
        FileNotFoundError, ValueError: nothing of the kind is there, or it has no rewards or weights.
        ImportError: TensorBoard's events without the tensorboard package.
    """
    if not path.exists():
        raise FileNotFoundError(f"run: expected a folder, {STATE} or {PROGRESS}, found no {path}")
    if path.is_file():
        return _read_file(path)
    states = [*path.glob(STATE), *path.glob(f"checkpoint-*/{STATE}")]
    if states:
        return max((_state(state) for state in states), key=_last_step)
    if (path / PROGRESS).is_file():
        return _progress(path / PROGRESS)
    events = list(path.rglob(EVENTS))
    if events:
        return _events(max(events, key=lambda file: file.stat().st_mtime).parent)
    raise ValueError(
        f"run: expected {STATE} (TRL writes it with each checkpoint), {PROGRESS} or {EVENTS} in {path}, "
        "found none"
    )


def _read_file(path: Path) -> Run:
    if path.suffix == ".json":
        return _state(path)
    if path.suffix == ".csv":
        return _progress(path)
    if "tfevents" in path.name:
        return _events(path)
    raise ValueError(f"run: expected {STATE}, {PROGRESS} or {EVENTS}, got {path.name}")


def _last_step(run: Run) -> float:
    return max(points[-1][0] for points in [*run.reward.values(), *run.weight.values()])


def _run(source: str, unit: str, logged: dict[str, Series], folder: Path) -> Run:
    run = Run(source, unit, {}, {}, {}, {}, {})
    for tag, points in logged.items():
        if match := REWARD.fullmatch(tag):
            run.reward[match[1] or match[2]] = points
        elif match := BY_REWARD.fullmatch(tag):
            kinds = {"weight": run.weight, "covariance": run.covariance, "signal": run.signal}
            kinds[match[1]][match[2]] = points
        elif match := CONFLICT.fullmatch(tag):
            run.conflict[match[1]] = points
    if not run.names:
        few = ", ".join(list(logged)[:8]) or "nothing"
        raise ValueError(
            f"run: expected metrics rewards/NAME/mean, rollout/reward/NAME or pama/weight/NAME, got {few}"
            f"{', ...' if len(logged) > 8 else ''} in {folder}"
        )
    return run


def _collect(rows: Iterable[tuple[float, dict[str, float]]]) -> dict[str, Series]:
    """Collects series by name; a later value for the same step replaces the earlier one."""
    logged: dict[str, dict[float, float]] = {}
    for step, values in rows:
        for tag, value in values.items():
            logged.setdefault(tag, {})[step] = value
    return {tag: sorted(points.items()) for tag, points in logged.items()}


def _state(path: Path) -> Run:
    try:
        history = json.loads(path.read_text(encoding="utf-8"))["log_history"]
        rows = [
            (
                float(entry["step"]),
                {
                    tag: math.nan if value is None else float(value)
                    for tag, value in entry.items()
                    if value is None or isinstance(value, (int, float))
                },
            )
            for entry in history
        ]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"run: expected the log_history of a trainer state in {path}: {type(error).__name__} {error}"
        ) from None
    return _run(_title(path), "step", _collect(rows), path)


def _title(path: Path) -> str:
    """The run's name: its folder, without the checkpoint's."""
    folder = path.resolve().parent
    return folder.parent.name if folder.name.startswith("checkpoint-") else folder.name


def _progress(path: Path) -> Run:
    columns = read_table(path).columns
    clock = next((name for name in ("time/total_timesteps", "time/iterations") if name in columns), None)
    rows = len(next(iter(columns.values())))
    steps = [number(cell) for cell in columns[clock]] if clock else [float(row) for row in range(1, rows + 1)]
    logged: dict[str, Series] = {}
    for tag, cells in columns.items():
        if REWARD.fullmatch(tag) or BY_REWARD.fullmatch(tag) or CONFLICT.fullmatch(tag):
            values = [number(cell) for cell in cells]
            logged[tag] = [(step, v) for step, v in zip(steps, values, strict=True) if not math.isnan(step)]
    unit = "step of the environments" if clock == "time/total_timesteps" else "iteration"
    return _run(_title(path), unit, logged or {tag: [] for tag in columns}, path)


def _events(path: Path) -> Run:
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    except ImportError:
        raise ImportError(
            "a TensorBoard folder needs the tensorboard package: pip install tensorboard"
        ) from None
    events = EventAccumulator(str(path), size_guidance={"scalars": 0})
    events.Reload()
    logged = {
        tag: sorted({point.step: point.value for point in events.Scalars(tag)}.items())
        for tag in events.Tags()["scalars"]
    }
    return _run(path.name, "step", logged, path)
