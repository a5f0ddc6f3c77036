"""The CPU rows of the goals that the project has set itself, held against the CSVs of one run.

A goal is a bound on a ratio that some part has measured. What has not been measured is said to be so.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from . import tokens
from .harness import read

Rows = Sequence[dict[str, str]]


@dataclass(frozen=True)
class Goal:
    """`measure` takes the rows of `part` and gives the ratios that must each be at least `least`."""

    part: str
    work: str
    against: str
    unit: str  # "x faster" | "% of its speed"
    least: float
    measure: Callable[[Rows], list[float]]
    least_avx2: float | None = None  # where the widest instructions are AVX2
    limit: Callable[[Rows], list[float]] | None = None  # what memory alone would allow

    def bound(self, kernels: str) -> float:
        narrow = self.least_avx2 is not None and not kernels.startswith("avx512")
        return self.least_avx2 if narrow and self.least_avx2 is not None else self.least


@dataclass(frozen=True)
class Verdict:
    work: str
    against: str
    goal: str
    measured: str
    met: str  # yes | no | not measured
    limit: str = ""  # the most that memory allows, if it is what limits


def ratios(
    work: str, contestant: str, case: str = "", n: Iterable[int] | None = None, size: int | None = None
) -> Callable[[Rows], list[float]]:
    """The ratios of a peer over ours in every row that fits; `case` is a part of the row's."""
    wanted = None if n is None else set(n)

    def measure(rows: Rows) -> list[float]:
        return [
            float(r["ratio"])
            for r in rows
            if r["work"] == work
            and r["contestant"] == contestant
            and case in r["case"]
            and (wanted is None or int(r["n"]) in wanted)
            and (size is None or r["size"] == str(size))
            and r["ratio"]
        ]

    return measure


def exact_case(work: str, contestant: str, case: str, n: int, size: int) -> Callable[[Rows], list[float]]:
    found = ratios(work, contestant, case, [n], size)
    return lambda rows: found([r for r in rows if r["case"] == case])


def memory_limit(
    measure: Callable[[Rows], list[float]], contestant: str, case: str, n: int, size: int, passes: int
) -> Callable[[Rows], list[float]]:
    """Of a call that does nothing but read its bytes `passes` times, at the bandwidth of the same run."""

    def at_most(rows: Rows) -> list[float]:
        speeds = [
            float(r["gigabytes_per_second"])
            for r in rows
            if (r["work"], r["case"], r["n"], r["size"], r["contestant"])
            == ("loss and gradient", case, str(n), str(size), contestant)
            and r["gigabytes_per_second"]
        ]
        memory = [
            float(r["gigabytes_per_second"])
            for r in rows
            if r["work"] == "bandwidth" and r["contestant"] == "read" and r["gigabytes_per_second"]
        ]
        return [x * memory[0] / (passes * y) for x, y in zip(measure(rows), speeds, strict=True) if memory]

    return at_most


def over(a: Callable[[Rows], list[float]], b: Callable[[Rows], list[float]]) -> Callable[[Rows], list[float]]:
    def measure(rows: Rows) -> list[float]:
        return [x / y for x, y in zip(a(rows), b(rows), strict=True)]

    return measure


MGDA, DAQP = "TorchJD MGDA", "DAQP"
ALL_N = range(2, 65)
PADDED = "padded, float32"


def _min_norm(name: str, n: Iterable[int], least: float, against: str) -> Goal:
    n = list(n)
    where = f"N={n[0]}" if len(n) == 1 else f"every N from {n[0]}"
    work = f"min_norm_weights, {where}, whole call"
    return Goal("solvers", work, against, "x faster", least, ratios("gram", name, "regular", n))


def _rows(case: str, wide: float, narrow: float) -> Goal:
    work = f"pama_weights, 1e6 rows, N=4, out=, {case}"

    def measure(rows: Rows) -> list[float]:
        shares = ratios("rows", "copy of as many bytes")
        return shares([r for r in rows if r["case"] == f"1e6 rows, float32, {case}"])

    return Goal("solvers", work, "copy bandwidth", "% of its speed", wide, measure, narrow)


def _loss(weights: str, wide: float, narrow: float, passes: int) -> Goal:
    case = f"{PADDED}, {weights}"
    measure = exact_case("loss and gradient", tokens.PPO, case, 8, 2**18)
    limit = memory_limit(measure, tokens.LOSS, case, 8, 2**18, passes)
    against = "eager PPO loss of one objective"
    work = f"pama_loss and gradient, 262,144 tokens, N=8, {weights}"
    return Goal("tokens", work, against, "x faster", wide, measure, narrow, limit)


GOALS = (
    Goal(
        *(
            "solvers",
            "pama_weights, N=4, float32, whole call",
            "eager PyTorch, the full rule",
            "x faster",
            10,
        ),
        ratios("scores", "eager PyTorch", n=[4]),
    ),
    Goal(
        *("solvers", "pama_weights, N=4, float32, whole call", "TorchJD's MGDA", "x faster", 100),
        ratios("scores", MGDA, n=[4]),
    ),
    Goal(
        *("solvers", "pama_weights, N=4, float32, whole call", "cvxpy", "x faster", 200),
        ratios("scores", "cvxpy (Clarabel)", n=[4]),
    ),
    _rows("non-negative", 0.70, 0.45),
    _rows("mixed signs", 0.50, 0.20),
    _rows("mixed signs, regularization 0.1", 0.45, 0.20),
    _min_norm(DAQP, ALL_N, 1.0, "DAQP's own call"),
    _min_norm(DAQP, [32], 1.7, "DAQP's own call"),
    _min_norm(DAQP, [64], 2.5, "DAQP's own call"),
    _min_norm(MGDA, [2], 30, "TorchJD's MGDA"),
    _min_norm(MGDA, range(3, 65), 100, "TorchJD's MGDA"),
    Goal(
        *("solvers", "10,000 matrices, N=8, one thread", "a loop over DAQP", "x faster", 6),
        ratios("batch", "loop over DAQP"),
    ),
    Goal(
        *("solvers", "10,000 matrices, N=8, two threads", "a loop over DAQP", "x faster", 10),
        over(ratios("batch", "loop over DAQP"), ratios("batch", "min_norm_weights, 2 threads")),
    ),
    Goal(
        *(
            "tokens",
            "objective_statistics, 262,144 tokens, N=4, cold",
            "read bandwidth",
            "% of its speed",
            0.65,
        ),
        exact_case("statistics", tokens.READ, PADDED, 4, 2**18),
        least_avx2=0.45,
    ),
    _loss("weights per token", 10, 6, 1),
    _loss("given weights", 10, 6, 1),
    _loss("weights per batch", 4, 3, 2),
    Goal(
        *("tokens", "pama_loss and gradient, 64 tokens, N=4", "eager PyTorch, the same rule", "x faster", 1),
        exact_case("loss and gradient", tokens.EAGER, f"{PADDED}, weights per batch", 4, 64),
    ),
)


def judge(goal: Goal, rows: Rows, kernels: str) -> Verdict:
    bound = goal.bound(kernels)
    measured = goal.measure(rows)
    percent = goal.unit.startswith("%")

    def shown(x: float) -> str:
        return f"{100 * x:.0f}{goal.unit}" if percent else f"{x:.3g}{goal.unit}"

    wanted = f">= {shown(bound)}"
    if not measured:
        return Verdict(goal.work, goal.against, wanted, "", "not measured")
    worst = min(measured)
    limits = goal.limit(rows) if goal.limit else []
    return Verdict(
        *(goal.work, goal.against, wanted, shown(worst), "yes" if worst >= bound else "no"),
        shown(min(limits)) if limits else "",
    )


def kernels(path: Path) -> str:
    """The instructions that the run used, from a CSV's head."""
    with path.open(encoding="utf-8") as file:
        return next((line[len("# kernels: ") :] for line in file if line.startswith("# kernels: ")), "")


def verdicts(folder: Path) -> list[Verdict]:
    """Of every goal, from the CSVs in `folder`; where one is missing, nothing is measured."""
    paths = {part: folder / f"{part}.csv" for part in dict.fromkeys(goal.part for goal in GOALS)}
    found = {part: path for part, path in paths.items() if path.exists()}
    any_run = next((kernels(path) for path in found.values()), "")
    rows = {part: read(path) for part, path in found.items()}
    return [
        judge(goal, rows.get(goal.part, []), kernels(found[goal.part]) if goal.part in found else any_run)
        for goal in GOALS
    ]


def write(folder: Path, judged: Sequence[Verdict]) -> Path:
    path = folder / "goals.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(f.name for f in fields(Verdict))
        writer.writerows(asdict(v).values() for v in judged)
    return path


def table(judged: Sequence[Verdict]) -> str:
    """For a terminal."""
    lines = [
        ("work", "against", "goal", "measured", "met", "memory allows"),
        *(tuple(asdict(v).values()) for v in judged),
    ]
    widths = [max(len(line[k]) for line in lines) for k in range(6)]
    return "\n".join(
        "  ".join(x.ljust(w) for x, w in zip(line, widths, strict=True)).rstrip() for line in lines
    )
