"""Writes the speed figures of the documentation from the CSVs, so that none is typed by hand.

`python -m benchmarks --docs` writes `TABLES[NAME]` between `<!-- benchmark: NAME -->` and `<!-- end -->`. The
goals are data: each names the rows of a CSV whose ratios it bounds.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import headline, losses, qp, solvers
from .harness import read
from .losses import BARE, BATCH, DEFAULT, GIVEN, LOSS, PAMA, TOKEN, TOKEN_REGULARIZED
from .tables import TABLES, digits, duration, markdown, one, rows_of, times
from .timing import FLOOR

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = ("README.md", "docs/performance.md", "docs/gpu.md")
MARKED = re.compile(r"(<!-- benchmark: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def fill(results: Path, root: Path = ROOT) -> None:
    """Rewrites the marked blocks of the documents."""
    for name in DOCUMENTS:
        path = root / name
        path.write_text(filled(path.read_text(encoding="utf-8"), results), encoding="utf-8")
        print(f"wrote {name}")


def filled(text: str, results: Path) -> str:
    def table(mark: re.Match[str]) -> str:
        try:
            inside = TABLES[mark[2]](results)
        except FileNotFoundError as error:
            inside = f"Not measured: {Path(error.filename).name} is missing."
        return f"{mark[1]}{inside}\n{mark[3]}"

    return MARKED.sub(table, text)


# --- goals -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Goal:
    """A bound on the ratio (time of the peer over ours) of every row of a CSV that `where` chooses."""

    work: str
    against: str
    sign: str  # ">=" | "<="
    bound: float
    part: str
    where: dict[str, Any] = field(default_factory=dict)  # a column: its value, or a container of its values
    inverse: bool = False  # bounds our time over the peer's
    unit: str = "x"  # or "%"

    def shown(self, x: float) -> str:
        return f"{100 * x:.0f}%" if self.unit == "%" else times(x)

    def line(self, results: Path) -> list[str]:
        bound = f"{100 * self.bound:g}%" if self.unit == "%" else f"{self.bound:g}x"
        head = [self.work, self.against, f"{self.sign} {bound}"]
        path = results / f"{self.part}.csv"
        rows = [r for r in read(path) if self.chooses(r)] if path.exists() else []
        if not rows:
            return [*head, "-", "not measured"]
        ratios = [1 / float(r["ratio"]) if self.inverse else float(r["ratio"]) for r in rows]
        least = self.sign == ">="
        worst = min(ratios) if least else max(ratios)
        met = worst >= self.bound if least else worst <= self.bound
        where = f" (N={rows[ratios.index(worst)]['n']})" * (len(rows) > 1)
        return [*head, self.shown(worst) + where, "yes" if met else "no"]

    def chooses(self, row: dict[str, str]) -> bool:
        def fits(key: str, wanted: Any) -> bool:
            if isinstance(wanted, (str, int)):
                return row[key] == str(wanted)
            return row[key] in {str(x) for x in wanted}

        return bool(row["ratio"]) and all(fits(key, wanted) for key, wanted in self.where.items())


PER_SEQUENCE, PER_TOKEN = "per sequence, float32", "padded, float32"
MIDDLE = {"work": losses.WORK, "n": 8, "size": 2**18}
ALL_N = range(2, solvers.ALL + 1)
EAGER_PPO = "eager PPO loss of one objective"
WHOLE = "`pama_loss` and gradient"


def _combine(dtype: str) -> Goal:
    work = f"`combine_advantages` (B, N), {dtype} mask of 512 x 4096, N=8"
    where = {"work": "combine", "n": 8, "case": f"mask 512 x 4096, {dtype}", "contestant": FLOOR}
    return Goal(work, "a read of the mask", "<=", 2, "sequence", where, inverse=True)


def _floor(rule: str, bound: float) -> Goal:
    where = {**MIDDLE, "case": f"{PER_TOKEN}, {rule}", "contestant": FLOOR}
    work = f"{WHOLE}, per token, 262,144 tokens, N=8, {rule}"
    return Goal(work, "floor", ">=", bound, "tokens", where, unit="%")


def _many(rule: str, bound: float) -> Goal:
    where = {**MIDDLE, "n": 32, "case": f"{PER_TOKEN}, {rule}", "contestant": losses.PPO}
    return Goal(f"{WHOLE}, per token, 262,144 tokens, N=32, {rule}", EAGER_PPO, ">=", bound, "tokens", where)


def _small(part: str, layout: str, rules: tuple[str, ...]) -> Goal:
    cases = [f"{layout}, {rule}" for rule in rules]
    where = {"work": losses.WORK, "n": 4, "size": 64, "case": cases, "contestant": losses.PPO}
    name = layout.partition(",")[0].replace("padded", "per token")
    work = f"{WHOLE}, {name}, 64 tokens, N=4, {' and '.join(rules)}"
    return Goal(work, EAGER_PPO, ">=", 2, part, where)


def _variant(part: str, work: str, case: str, name: str, sign: str, bound: float, against: str) -> Goal:
    where = {"work": "variants", "case": case, "contestant": name}
    return Goal(work, against, sign, bound, part, where)


def _solver(kind: str, work: str, contestant: str, bound: float, n: Any = ALL_N, also: str = "") -> Goal:
    where = {"work": work, "case": f"float64, {kind} pool", "contestant": contestant, "n": n}
    every = f"N={n}" if isinstance(n, int) else f"N={n[0]}..{n[-1]}"
    function = {"gram": "min_norm_weights", "upgrad": "upgrad_weights"}[work]
    return Goal(f"`{function}`, {kind} matrices, {every}", also or contestant, ">=", bound, "solvers", where)


def _scores(contestant: str, bound: float) -> Goal:
    where = {"work": "scores", "n": 4, "contestant": contestant}
    return Goal("`pama_weights`, one row, N=4", contestant, ">=", bound, "solvers", where)


def _batch(threads: str, bound: float) -> Goal:
    case = "10,000 square Wishart matrices, float64" + threads
    where = {"work": "batch", "case": case, "contestant": "loop over DAQP"}
    work = f"`min_norm_weights`, 10,000 matrices, N=8{threads}"
    return Goal(work, "a loop over DAQP", ">=", bound, "solvers", where)


def _rows(case: str, bound: float) -> Goal:
    where = {"work": "rows", "case": f"1e6 rows, float32, {case}", "contestant": "copy of as many bytes"}
    return Goal(f"`pama_weights`, 1e6 rows, N=4, {case}", "copy", ">=", bound, "solvers", where, unit="%")


GOALS = (
    _combine("bool"),
    _combine("int64"),
    Goal(
        f"{WHOLE}, per sequence, 262,144 tokens, N=8, {DEFAULT}",
        *(EAGER_PPO, ">=", 8, "sequence"),
        {**MIDDLE, "case": f"{PER_SEQUENCE}, {DEFAULT}", "contestant": losses.PPO},
    ),
    _variant(
        *("sequence", f"{WHOLE}, per sequence, N=64", f"{PER_SEQUENCE}, {DEFAULT}", "N=64"),
        *("<=", 1.1, "N=1"),
    ),
    *(_floor(rule, bound) for rule, bound in ((BARE, 0.85), (GIVEN, 0.85), (TOKEN, 0.75), (BATCH, 0.9))),
    *(_floor(rule, 0.85) for rule in (DEFAULT, PAMA)),
    _variant(
        *("tokens", f"{WHOLE}, {TOKEN_REGULARIZED}, N=8", f"{PER_TOKEN}, {TOKEN}", TOKEN_REGULARIZED),
        *("<=", 1.3, "regularization 0"),
    ),
    *(
        _variant(
            *("tokens", f"{WHOLE}, bfloat16, N=8, {rule}", f"padded, bfloat16, {rule}", "float32"),
            *(">=", 1.6, "float32"),
        )
        for rule in (BATCH, DEFAULT)
    ),
    _many(TOKEN, 1.5),
    _many(BATCH, 1.0),
    _small("sequence", PER_SEQUENCE, (DEFAULT,)),
    _small("tokens", PER_TOKEN, (DEFAULT, TOKEN)),
    *(_solver(kind, "upgrad", solvers.TORCHJD, 30) for kind in ("regular", "singular")),
    *(_solver(kind, "gram", qp.DAQP, 1) for kind in ("regular", "singular")),
    *(_solver("regular", "gram", qp.DAQP, bound, n) for n, bound in ((32, 1.7), (64, 2.5))),
    _solver("regular", "gram", "TorchJD MGDA", 100, range(4, solvers.ALL + 1)),
    *(_scores(*x) for x in (("eager PyTorch", 10), ("TorchJD MGDA", 100), ("cvxpy (Clarabel)", 200))),
    _batch("", 6),
    _batch(", 2 threads", 10),
    _rows("non-negative", 0.7),
    _rows("mixed signs", 0.5),
    _rows("mixed signs, regularization 0.1", 0.45),
)


def goals(results: Path) -> str:
    head = ["work", "against", "goal", "measured", "met"]
    return markdown(head, [goal.line(results) for goal in GOALS])


# --- README ------------------------------------------------------------------------------------------


def figures(results: Path) -> str:
    """The figures of the README: the loss per sequence, the weights, the solvers."""
    case: dict[str, Any] = {**MIDDLE, "case": f"{PER_SEQUENCE}, {DEFAULT}"}
    loss, ppo = (one(results, "sequence", contestant=name, **case) for name in (LOSS, losses.PPO))
    largest = max(int(r["size"]) for r in rows_of(results, "headline", contestant=headline.MGDA))
    weights: dict[str, Any] = {"work": "time to the weights", "n": headline.MODEL_N, "size": largest}
    pama, mgda = (
        one(results, "headline", contestant=name, **weights)["microseconds"]
        for name in (headline.PAMA, headline.MGDA)
    )

    def beside(work: str, ours: str, peer: str) -> str:
        where: dict[str, Any] = {"work": work, "case": "float64, regular pool", "n": 8}
        time = one(results, "solvers", contestant=ours, **where)["microseconds"]
        other = one(results, "solvers", contestant=peer, **where)
        return f"{duration(time)} ({peer.partition(',')[0]}: {duration(other['microseconds'])})"

    ratio, millions, time = float(ppo["ratio"]), round(largest / 10**6), duration(loss["microseconds"])
    beside_ppo = f"{digits(max(ratio, 1 / ratio))} times {'faster' if ratio >= 1 else 'slower'} than"
    return (
        "- The loss of 8 objectives with its gradient, advantages per sequence (262,144 tokens, one\n"
        f"  thread): {time}, {beside_ppo} eager PyTorch's PPO loss of one objective.\n"
        f"- From the advantages of {headline.MODEL_N} objectives to their weights: {duration(pama)};\n"
        f"  from the gradients of a model of {millions} million parameters (MGDA): {duration(mgda)}.\n"
        "- From the Gram matrix of 8 objectives to their weights, a call from Python (in brackets: another\n"
        f"  library): min-norm {beside('gram', 'min_norm_weights', qp.DAQP)},\n"
        f"  UPGrad {beside('upgrad', 'upgrad_weights', solvers.TORCHJD)}."
    )


TABLES |= {"figures": figures, "goals": goals}
