"""One part of the benchmarks: this library and its peers, compared, timed, printed and written to a CSV."""

from __future__ import annotations

import csv
import datetime
import importlib.metadata
import os
import re
import statistics
import subprocess
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from tqdm import tqdm

from pama_kernels.tools import info

from .timing import Contestant, Missing, interleaved, peak_memory, summary

PACKAGES = (
    *("torch", "numpy", "daqp", "quadprog", "piqp", "proxsuite", "qpsolvers", "torchjd", "cvxpy"),
    *("transformers", "trl", "verl", "liger-kernel"),
)


@dataclass
class Row:
    work: str
    case: str
    n: int
    contestant: str
    threads: int
    microseconds: float | None  # median over rounds
    spread: float | None  # interquartile range over median
    ratio: float | None  # median over rounds of theirs / ours
    difference: float | None  # from ours, as the contestant's check has it
    note: str
    size: int | None = None  # tokens, rows or parameters
    gigabytes_per_second: float | None = None  # counted bytes over the median
    peak_megabytes: float | None = None  # the most that was resident during a call, beyond what was before it
    input_megabytes: float | None = None  # of one call


class Disagreement(RuntimeError):
    """Results that should be equal are not."""


@dataclass
class Session:
    """One part: its rows, printed as they come, and its CSV."""

    part: str
    out: Path
    quick: bool
    command: str
    seconds: float  # for ours and one peer together
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def each(self, works: Sequence[Callable[[], None]]) -> None:
        """Runs all of them with a progress bar, even if some fail, and writes the CSV."""
        for work in tqdm(works, desc=self.part, unit="case", disable=None):
            try:
                work()
            except Exception:  # noqa: PERF203 any: the others run
                lines = traceback.format_exc()
                self.failures.append(f"{self.part}: {lines.strip().splitlines()[-1]}")
                tqdm.write(lines)
        self.write()

    def measure(
        self,
        work: str,
        case: str,
        n: int,
        contestants: Sequence[Contestant | Missing],
        *,
        size: int | None = None,
        input_bytes: int | None = None,
    ) -> list[Row]:
        """Checks that the contestants agree, times them, and keeps and prints their rows.

        This library alternates with one peer at a time, since some peers slow down later calls in the same
        process; its own row is from the first pair. A peer that fails or disagrees gets a row without a time
        and counts as a failure of the session. With `input_bytes` (of one call), peak memory is measured too.
        """
        ours, *others = contestants
        assert isinstance(ours, Contestant)
        where = f"{work}, {case}, N={n}"
        rows: list[Row] = []

        def row(c: Contestant, times: list[float], ratio: float, difference: float | None) -> Row:
            middle, spread = summary(times)
            speed = None if c.moved is None else c.moved / middle * 1e-3
            peak = None if input_bytes is None else peak_memory(c)
            return Row(
                *(work, case, n, c.name, c.threads, middle, spread, ratio, difference, c.note, size, speed),
                *(None if x is None else x * 1e-6 for x in (peak, input_bytes)),
            )

        own_difference = _agreement(ours)
        own: list[float] = []
        for c in others:
            if isinstance(c, Contestant):
                try:
                    difference = _agreement(c)
                    mine, theirs = interleaved((ours, c), self.seconds)
                except Exception as error:  # each peer has its own
                    reason = f"{type(error).__name__}: {str(error).strip()}".splitlines()[0][:200]
                    self.failures.append(f"{where}: {c.name}: {reason}")
                    c = Missing(c.name, reason)
            if isinstance(c, Missing):
                reason = f"missing: {c.reason}"
                rows.append(Row(work, case, n, c.name, 1, None, None, None, None, reason, size))
                continue
            own = own or mine
            ratio = statistics.median(t / o for t, o in zip(theirs, mine, strict=True))
            rows.append(row(c, theirs, ratio, difference))
        if not own:
            (own,) = interleaved((ours,), self.seconds)
        rows.insert(0, row(ours, own, 1.0, own_difference))
        self.add(rows)
        return rows

    def add(self, rows: Sequence[Row]) -> None:
        """Keeps and prints the rows of one case."""
        self.rows += rows
        self._print(rows)

    def _print(self, rows: Sequence[Row]) -> None:
        first = rows[0]
        lines = [f"{first.work}: {first.case}, N={first.n}"]
        for r in rows:
            if r.microseconds is None:
                lines.append(f"  {'':>9}  {'':>14}  {'':>11}  {r.contestant}  {r.note}")
                continue
            off = "" if r.difference is None else f"  off by {r.difference:.0e}"
            ratio = f"{'':>9}" if r.ratio is None else f"{r.ratio:>8.2f}x"
            lines.append(
                f"  {ratio}  {r.microseconds:>11.3f} us  spread {100 * (r.spread or 0):>3.0f}%  "
                f"{r.contestant}{off}{_extra(r)}  {r.note}".rstrip()
            )
        tqdm.write("\n".join(lines))

    @property
    def csv(self) -> Path:
        return self.out / f"{self.part}.csv"

    def measured(self) -> bool:
        """Whether the existing CSV is from this command and this commit, without changes."""
        if not self.csv.exists():
            return False
        head = provenance_of(self.csv)
        return (head["command"], head["commit"]) == (self.command, _commit()) and " " not in _commit()

    def write(self) -> None:
        with self.csv.open("w", newline="", encoding="utf-8") as file:
            for key, value in self.provenance().items():
                file.write(f"# {key}: {value}\n")
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(f.name for f in fields(Row))
            for row in self.rows:
                writer.writerow("" if x is None else _short(x) for x in asdict(row).values())
        print(f"wrote {self.csv}")

    def provenance(self) -> dict[str, str]:
        machine = info.collect()
        cpu = next(b for b in machine["backends"] if b["name"] == "cpu")
        return {
            "command": self.command,
            "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
            "commit": _commit(),
            "processor": f"{machine['processor']}, {machine['cores']} cores",
            "kernels": cpu["detail"],
            "versions": ", ".join(
                f"{name} {version}"
                for name, version in [
                    ("python", machine["versions"]["python"]),
                    ("pama-kernels", machine["versions"]["pama-kernels"]),
                    *((name, _version(name)) for name in PACKAGES),
                ]
            ),
            **{f"note {i}": note for i, note in enumerate(self.notes, 1)},
        }


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV that a part has written."""
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(line for line in file if not line.startswith("#")))


def provenance_of(path: Path) -> dict[str, str]:
    """The head of a CSV."""
    return dict(re.findall(r"^# ([\w ]+): (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE))


def _extra(row: Row) -> str:
    speed, peak = row.gigabytes_per_second, row.peak_megabytes
    return f"  {speed or 0:.1f} GB/s" * (speed is not None) + f"  +{peak or 0:.0f} MB" * (peak is not None)


def _short(value: Any) -> Any:
    return f"{value:.5g}" if isinstance(value, float) else value


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def _commit() -> str:
    """The commit, and whether files that are part of it have been changed. Without git: `PAMA_COMMIT`."""
    try:
        root = Path(__file__).parent
        head, changed = (
            subprocess.run(
                ["git", *words], cwd=root, capture_output=True, text=True, check=True
            ).stdout.strip()
            for words in (
                ("rev-parse", "--short=12", "HEAD"),
                ("status", "--porcelain", "--untracked-files=no", "--", "../pama_kernels", "../csrc"),
            )
        )
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("PAMA_COMMIT", "unknown")
    return head + (" with changes" if changed else "")


def _agreement(c: Contestant) -> float | None:
    if c.check is None:
        return None
    difference = c.check(c)
    if c.tolerance is not None and not difference <= c.tolerance:
        raise Disagreement(f"{c.name} differs by {difference:.2e}, more than {c.tolerance:g}")
    return difference
