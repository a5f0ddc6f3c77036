"""The tables of the documentation, each from the rows of a CSV."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from . import gpu_report, headline, losses, sequence, step, tokens
from .harness import provenance_of, read
from .timing import FLOOR

Row = dict[str, str]
PARTS = ("sequence", "tokens", "solvers", "headline", "step")


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
    """Three digits, without an exponent."""
    if x >= 100:
        return f"{x:,.0f}"
    return f"{x:.1f}" if x >= 10 else f"{x:.2f}"


def times(ratio: str | float) -> str:
    return "-" if ratio == "" else f"{digits(float(ratio))}x"


def percent(share: str | float) -> str:
    return "-" if share == "" else f"{100 * float(share):.0f}%"


def missing(rows: Iterable[Row]) -> str:
    """A line for each contestant without a time in some row, with the reasons."""
    reasons: dict[str, dict[str, None]] = {}
    for r in rows:
        if not r["microseconds"]:
            reasons.setdefault(r["contestant"], {})[r["note"].removeprefix("missing: ")] = None
    return "".join(f"\n\nNo time for {name}: {'; '.join(notes)}." for name, notes in reasons.items())


# --- tables ------------------------------------------------------------------------------------------


def runs(results: Path) -> str:
    """Where each CSV comes from."""
    keys = ("command", "date", "commit", "processor", "kernels")
    heads = [provenance_of(results / f"{part}.csv") for part in PARTS]
    lines = [[f"`{head[keys[0]]}`", *(head[key] for key in keys[1:])] for head in heads]
    versions = dict.fromkeys(head["versions"] for head in heads)
    return f"{markdown(keys, lines)}\n\nVersions: {'; '.join(versions)}."


def of_losses(part: str, peers: Sequence[str]) -> Callable[[Path], str]:
    """A line for each case: our time, the floor, and the times of the peers divided by ours."""

    def table(results: Path) -> str:
        rows = rows_of(results, part, work=losses.WORK)
        lines = []
        for r in (r for r in rows if r["contestant"] == losses.LOSS):
            same = [x for x in rows if all(x[key] == r[key] for key in ("case", "n", "size"))]
            beside = {x["contestant"]: x["ratio"] for x in same}
            floor = next((x for x in same if x["contestant"] == FLOOR), None)
            peak = f"{float(r['peak_megabytes']):.1f}" if r["peak_megabytes"] else "-"
            lines.append(
                [
                    r["case"],
                    *(f"{int(r['size']):,}", r["n"], duration(r["microseconds"])),
                    duration(floor["microseconds"]) if floor else "-",
                    percent(floor["ratio"]) if floor else "-",
                    *(times(beside.get(name, "")) for name in peers),
                    peak,
                ]
            )
        head = ["input, rule", "tokens", "N", "pama_loss", "floor", "of floor", *peers, "peak MB"]
        return markdown(head, lines) + missing(rows)

    return table


def variants(part: str) -> Callable[[Path], str]:
    def table(results: Path) -> str:
        rows = rows_of(results, part, work="variants")
        base: dict[str, Row] = {}
        lines = []
        for r in rows:
            first = base.setdefault(r["case"], r)
            if r is not first:
                names = (first["contestant"], r["contestant"])
                cells = (duration(first["microseconds"]), duration(r["microseconds"]), times(r["ratio"]))
                lines.append([r["case"], *names, *cells])
        return markdown(
            ["input", "first", "second", "first takes", "second takes", "second over first"], lines
        )

    return table


def combine(results: Path) -> str:
    lines = []
    for r in rows_of(results, "sequence", work="combine", contestant=sequence.COMBINE):
        floor = one(results, "sequence", work="combine", case=r["case"], n=r["n"], contestant=FLOOR)
        over = times(1 / float(floor["ratio"]))
        lines.append([r["case"], r["n"], duration(r["microseconds"]), duration(floor["microseconds"]), over])
    return markdown(["input", "N", "time", "floor: a read of the mask", "over the floor"], lines)


def bandwidth(results: Path) -> str:
    rows = rows_of(results, "tokens", work="bandwidth")
    return markdown(["", "GB/s"], [[r["contestant"], digits(float(r["gigabytes_per_second"]))] for r in rows])


def statistics(results: Path) -> str:
    rows = rows_of(results, "tokens", work="statistics", contestant=tokens.STATISTICS)
    lines = []
    for r in rows:
        same = {key: r[key] for key in ("case", "n", "size")}
        floor, eager, pairs = (
            one(results, "tokens", work="statistics", contestant=name, **same)
            for name in (FLOOR, tokens.EAGER, f"{tokens.STATISTICS}, with pairs")
        )
        cells = (duration(r["microseconds"]), percent(floor["ratio"]), times(eager["ratio"]))
        lines.append([r["case"], f"{int(r['size']):,}", r["n"], *cells, duration(pairs["microseconds"])])
    head = ["input", "tokens", "N", "time", "of floor", "eager PyTorch", "with N x N sums"]
    return markdown(head, lines)


def of_solvers(work: str, case: str) -> Callable[[Path], str]:
    """Contestants down, N across; in brackets how many times our time."""

    def table(results: Path) -> str:
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
        text = markdown(["", *(f"N={n}" for n in shown)], lines)
        for name in names[1:]:
            of_all = [r for r in rows if r["contestant"] == name and r["ratio"]]
            if len(of_all) > len(shown):
                least = min(of_all, key=lambda r: float(r["ratio"]))
                count = f"{len(of_all)} values of N from {of_all[0]['n']} to {of_all[-1]['n']}"
                text += f"\n\n{name}, smallest ratio over {count}: {times(least['ratio'])} (N={least['n']})."
        return text + missing(rows)

    return table


def batches(results: Path) -> str:
    rows = rows_of(results, "solvers", work="batch")
    lines = [[r["case"], r["contestant"], duration(r["microseconds"]), times(r["ratio"])] for r in rows]
    return markdown(["matrices, N=8", "", "time", "over ours"], lines)


def many_rows(results: Path) -> str:
    ours = "pama_weights(out=)"
    cases = dict.fromkeys(r["case"] for r in rows_of(results, "solvers", work="rows"))
    lines = []
    for case in cases:
        time = one(results, "solvers", work="rows", case=case, contestant=ours)
        copy = one(results, "solvers", work="rows", case=case, contestant="copy of as many bytes")
        lines.append([case, duration(time["microseconds"]), percent(copy["ratio"])])
    return markdown(["rows", "time", "share of copy bandwidth"], lines)


def headline_table(results: Path) -> str:
    rows = rows_of(results, "headline", work="time to the weights")
    names = (headline.PAMA, headline.MGDA_UB, headline.MGDA)
    lines = []
    for case, size, n in dict.fromkeys((r["case"], r["size"], r["n"]) for r in rows):
        found = {r["contestant"]: r for r in rows if (r["case"], r["n"]) == (case, n)}
        cells = [duration(found[name]["microseconds"]) for name in names]
        lines.append([case, f"{int(size):,}", n, *cells])
    return markdown(["model", "parameters", "n", *names], lines)


def steps(results: Path) -> str:
    names = (step.PAMA, step.SINGLE, step.MGDA, step.PAMA_SHARE, step.SINGLE_SHARE)
    lines = []
    for case in dict.fromkeys(r["case"] for r in rows_of(results, "step")):
        cells = [case]
        for name in names:
            r = one(results, "step", case=case, contestant=name)
            share = name in (step.PAMA_SHARE, step.SINGLE_SHARE) and r["ratio"] != ""
            cells.append(duration(r["microseconds"]) + f" ({100 * float(r['ratio'] or 0):.2f}%)" * share)
        lines.append(cells)
    return markdown(["model", *names], lines)


TABLES: dict[str, Callable[[Path], str]] = {
    "runs": runs,
    "sequence": of_losses("sequence", (losses.PPO, *losses.TRAINERS, losses.EAGER)),
    "sequence-variants": variants("sequence"),
    "combine": combine,
    "tokens": of_losses("tokens", (losses.PPO, losses.TRL, losses.VERL, losses.EAGER, losses.COMPILED)),
    "tokens-variants": variants("tokens"),
    "bandwidth": bandwidth,
    "statistics": statistics,
    "scores": of_solvers("scores", "float32, mixed pool"),
    "gram": of_solvers("gram", "float64, regular pool"),
    "gram-singular": of_solvers("gram", "float64, singular pool"),
    "upgrad": of_solvers("upgrad", "float64, regular pool"),
    "upgrad-singular": of_solvers("upgrad", "float64, singular pool"),
    "batch": batches,
    "rows": many_rows,
    "headline": headline_table,
    "step": steps,
    "gpu": gpu_report.gpu,
}
