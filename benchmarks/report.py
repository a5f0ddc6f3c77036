"""Tables of the documentation from the CSVs, so that no figure in it is typed by hand.

`python -m benchmarks --docs` writes `TABLES[NAME]` between `<!-- benchmark: NAME -->` and `<!-- end -->`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from . import gpu_report, headline, step, tokens
from .harness import read

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = ("README.md", "docs/performance.md", "docs/gpu.md")
MARKED = re.compile(r"(<!-- benchmark: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)

Row = dict[str, str]


def fill(results: Path, root: Path = ROOT) -> None:
    """Rewrites the marked places of the documents."""
    for name in DOCUMENTS:
        path = root / name
        path.write_text(filled(path.read_text(encoding="utf-8"), results), encoding="utf-8")
        print(f"wrote {name}")


def filled(text: str, results: Path) -> str:
    return MARKED.sub(lambda m: f"{m[1]}{TABLES[m[2]](results)}\n{m[3]}", text)


# --- pieces ------------------------------------------------------------------------------------------


def rows_of(results: Path, part: str, **wanted: str | int) -> list[Row]:
    chosen = {key: str(value) for key, value in wanted.items()}
    rows = read(results / f"{part}.csv")
    return [r for r in rows if all(r[key] == value for key, value in chosen.items())]


def one(results: Path, part: str, **wanted: str | int) -> Row:
    rows = rows_of(results, part, **wanted)
    if len(rows) != 1:
        raise ValueError(f"{part}.csv: expected one row with {wanted}, got {len(rows)}")
    return rows[0]


def markdown(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    listed = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in listed)


def duration(microseconds: str | float) -> str:
    """Three digits and a unit."""
    if microseconds == "":
        return "-"
    x = float(microseconds)
    for unit, size in (("s", 1e6), ("ms", 1e3), ("µs", 1.0)):
        if x >= size:
            return f"{digits(x / size)} {unit}"
    return f"{digits(x * 1e3)} ns"


def digits(x: float) -> str:
    """Three of them, without an exponent."""
    if x >= 100:
        return f"{x:,.0f}"
    return f"{x:.1f}" if x >= 10 else f"{x:.2f}"


def times(ratio: str | float) -> str:
    return "-" if ratio == "" else f"{digits(float(ratio))}x"


def percent(share: str) -> str:
    return f"{100 * float(share):.0f}%"


def spread(row: Row) -> str:
    return percent(row["spread"]) if row["spread"] else "-"


def latencies(results: Path, work: str, case: str) -> str:
    """Contestants down, N across; in brackets how many times our time."""
    rows = rows_of(results, "solvers", work=work, case=case)
    sizes = sorted({int(r["n"]) for r in rows})
    shown = [n for n in sizes if n & (n - 1) == 0]
    names = list(dict.fromkeys(r["contestant"] for r in rows))

    def cell(name: str, n: int) -> str:
        found = [r for r in rows if r["contestant"] == name and r["n"] == str(n)]
        if not found or not found[0]["microseconds"]:
            return "-"
        time = duration(found[0]["microseconds"])
        return f"**{time}**" if name == names[0] else f"{time} ({times(found[0]['ratio'])})"

    lines = [[name, *(cell(name, n) for n in shown)] for name in names]
    table = markdown(["", *(f"N={n}" for n in shown)], lines)
    missing = {r["contestant"]: r["note"] for r in rows if not r["microseconds"]}
    return table + "".join(f"\n\n{name}: {note}." for name, note in missing.items())


# --- tables ------------------------------------------------------------------------------------------


def runs(results: Path) -> str:
    """Where each CSV comes from."""
    keys = ("command", "date", "commit", "processor", "kernels")
    lines = []
    for part in ("solvers", "tokens", "headline", "step"):
        text = (results / f"{part}.csv").read_text(encoding="utf-8")
        head = dict(re.findall(r"^# ([\w ]+): (.*)$", text, re.MULTILINE))
        lines.append([f"`{head[keys[0]]}`", *(head[key] for key in keys[1:])])
    versions = head["versions"]
    return f"{markdown(keys, lines)}\n\nVersions: {versions}."


def scores(results: Path) -> str:
    return latencies(results, "scores", "float32, mixed pool")


def gram(results: Path) -> str:
    return latencies(results, "gram", "float64, regular pool")


def gram_singular(results: Path) -> str:
    return latencies(results, "gram", "float64, singular pool")


def upgrad(results: Path) -> str:
    return latencies(results, "upgrad", "float64, regular pool")


def many_rows(results: Path) -> str:
    ours = "pama_weights(out=)"
    cases = dict.fromkeys(r["case"] for r in rows_of(results, "solvers", work="rows"))
    lines = []
    for case in cases:
        time = one(results, "solvers", work="rows", case=case, contestant=ours)
        copy = one(results, "solvers", work="rows", case=case, contestant="copy of as many bytes")
        lines.append([case, duration(time["microseconds"]), percent(copy["ratio"])])
    return markdown(["rows", "time", "share of copy bandwidth"], lines)


def bandwidth(results: Path) -> str:
    rows = rows_of(results, "tokens", work="bandwidth")
    return markdown(["", "GB/s"], [[r["contestant"], digits(float(r["gigabytes_per_second"]))] for r in rows])


def statistics(results: Path) -> str:
    rows = rows_of(results, "tokens", work="statistics", contestant="objective_statistics")
    lines = []
    for r in rows:
        same = {key: r[key] for key in ("case", "n", "size")}
        reading = one(results, "tokens", work="statistics", contestant=tokens.READ, **same)
        eager = one(results, "tokens", work="statistics", contestant=tokens.EAGER, **same)
        lines.append(
            [
                *(r["case"], f"{int(r['size']):,}", r["n"], duration(r["microseconds"])),
                *(digits(float(r["gigabytes_per_second"])), percent(reading["ratio"]), times(eager["ratio"])),
            ]
        )
    return markdown(["input", "tokens", "N", "time", "GB/s", "of read bandwidth", "eager takes"], lines)


def loss(results: Path) -> str:
    """One size, every contestant: time, ratio, peak memory."""
    lines = []
    for work in ("loss and gradient", "loss without gradient"):
        for r in rows_of(results, "tokens", work=work, n=8, size=2**18):
            if not r["case"].startswith("padded, float32"):
                continue
            peak = f"{float(r['peak_megabytes']):.1f}" if r["peak_megabytes"] else "-"
            weights = r["case"].removeprefix("padded, float32, ")
            weights += ", no gradient" * (work == "loss without gradient")
            ours = r["contestant"] == tokens.LOSS
            name = f"**{r['contestant']}**" if ours else r["contestant"]
            time = duration(r["microseconds"]) if r["microseconds"] else r["note"]
            lines.append([weights, name, time, times(r["ratio"]), spread(r), peak])
    return markdown(["weights", "", "time", "over ours", "spread", "peak MB"], lines)


def loss_cases(results: Path) -> str:
    """Every other size, layout and dtype: ours, and what the peers take over it."""
    rows = rows_of(results, "tokens", work="loss and gradient", contestant=tokens.LOSS)
    peers = (tokens.EAGER, tokens.COMPILED, tokens.PPO, tokens.TRL, tokens.VERL)
    lines = []
    for r in rows:
        same = {key: r[key] for key in ("work", "case", "n", "size")}
        beside = {x["contestant"]: times(x["ratio"]) for x in rows_of(results, "tokens", **same)}
        per_token = float(r["microseconds"]) * 1e3 / int(r["size"])
        lines.append(
            [
                *(r["case"], f"{int(r['size']):,}", r["n"], duration(r["microseconds"])),
                *(f"{digits(per_token)} ns", *(beside.get(name, "-") for name in peers)),
            ]
        )
    return markdown(["input", "tokens", "N", "ours", "per token", *peers], lines)


def combine(results: Path) -> str:
    lines = []
    for r in rows_of(results, "tokens", work="combine", contestant=tokens.COMBINE):
        reading = one(results, "tokens", work="combine", n=r["n"], contestant=tokens.MASK)
        lines.append([r["case"], r["n"], duration(r["microseconds"]), times(1 / float(reading["ratio"]))])
    return markdown(["input", "N", "time", "over a read of the mask"], lines)


def headline_table(results: Path) -> str:
    rows = rows_of(results, "headline", work="time to the weights")
    names = (headline.PAMA, headline.MGDA_UB, headline.MGDA)
    lines = []
    for case, size, n in dict.fromkeys((r["case"], r["size"], r["n"]) for r in rows):
        found = {r["contestant"]: r for r in rows if (r["case"], r["n"]) == (case, n)}
        cells = [duration(found[name]["microseconds"]) for name in names]
        lines.append([case, f"{int(size):,}", n, *cells])
    return markdown(["model", "parameters", "n", *names], lines)


def milliseconds(results: Path) -> str:
    rows = rows_of(results, "headline", work="within milliseconds")
    return markdown(
        ["", "time", "spread"], [[r["contestant"], duration(r["microseconds"]), spread(r)] for r in rows]
    )


def steps(results: Path) -> str:
    names = (step.PAMA, step.SINGLE, step.PAMA_SHARE, step.SINGLE_SHARE)
    lines = []
    for case in dict.fromkeys(r["case"] for r in rows_of(results, "step")):
        found = [one(results, "step", case=case, contestant=name) for name in names]
        shares = [
            f" ({100 * float(r['ratio']):.2f}%)" * (name in names[2:])
            for name, r in zip(names, found, strict=True)
        ]
        cells = [duration(r["microseconds"]) + share for r, share in zip(found, shares, strict=True)]
        lines.append([case, *cells])
    return markdown(["model", *names], lines)


def figures(results: Path) -> str:
    """The three of the README."""
    ppo = one(
        *(results, "tokens"),
        work="loss and gradient",
        case=f"padded, float32, {tokens.BATCH}",
        n=8,
        size=2**18,
        contestant=tokens.PPO,
    )
    solver: dict[str, str | int] = {"work": "gram", "case": "float64, regular pool", "n": 8}
    ours = one(results, "solvers", contestant="min_norm_weights", **solver)
    daqp = one(results, "solvers", contestant="DAQP", **solver)
    largest = max(int(r["size"]) for r in rows_of(results, "headline", contestant=headline.MGDA))
    weights: dict[str, str | int] = {"work": "time to the weights", "n": 4, "size": largest}
    pama = one(results, "headline", contestant=headline.PAMA, **weights)
    mgda = one(results, "headline", contestant=headline.MGDA, **weights)
    ratio = float(ppo["ratio"])
    beside = f"{digits(ratio)} times faster than" if ratio >= 1 else f"{digits(1 / ratio)} times slower than"
    pama_time, mgda_time, our_time, daqp_time = (
        duration(r["microseconds"]) for r in (pama, mgda, ours, daqp)
    )
    return (
        f"- The loss of 8 objectives with its gradient (262,144 tokens, one thread): {beside}\n"
        "  eager PyTorch's PPO loss of one objective.\n"
        f"- From the advantages of 4 objectives to their weights: {pama_time}; from the gradients\n"
        f"  of a model of {largest / 1e6:.0f} million parameters (MGDA): {mgda_time}.\n"
        f"- The min-norm problem of 8 objectives, whole call from Python: {our_time}; DAQP,\n"
        f"  a fast QP solver: {daqp_time} ({times(daqp['ratio'])})."
    )


TABLES: dict[str, Callable[[Path], str]] = {
    "figures": figures,
    "runs": runs,
    "scores": scores,
    "gram": gram,
    "gram-singular": gram_singular,
    "upgrad": upgrad,
    "rows": many_rows,
    "bandwidth": bandwidth,
    "statistics": statistics,
    "loss": loss,
    "loss-cases": loss_cases,
    "combine": combine,
    "headline": headline_table,
    "milliseconds": milliseconds,
    "step": steps,
    "gpu": gpu_report.gpu,
}
