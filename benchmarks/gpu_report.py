"""The table of docs/gpu.md from benchmarks/results/gpu.csv."""

from __future__ import annotations

from pathlib import Path

from .harness import provenance_of, read

WEIGHTS, COMBINE = "statistics and weights", "combine_advantages"
PER_SEQUENCE, PER_TOKEN = "pama_loss, advantages per sequence", "pama_loss per batch"
SCORES, SUMS = f"{WEIGHTS} (scores), 1M tokens, N=4", "`objective_statistics`, 64M tokens, N=4"
GRAM_LOSS = "`pama_loss` and gradient, Pama(), (B, N), 512 x 4096, N=8"
SCORES_LOSS = "`pama_loss` and gradient, scores, per token, 1M tokens, N=4"
EIGHT, MANY = ((f"{COMBINE} per sequence", f"mask 512 x {width}") for width in (4096, 128))
# What is shown, its work, what its case begins with, the contestant, the kind of time, the goal.
ROWS = (
    (SCORES, WEIGHTS, "1048576", WEIGHTS, "device", "12 µs"),
    ("the same, `Pama()`", WEIGHTS, "1048576", f"{WEIGHTS}, Pama()", "device", ""),
    ("the same, UPGrad", WEIGHTS, "1048576", f"{WEIGHTS}, UPGrad", "device", ""),
    (SUMS, WEIGHTS, "67108864", "objective_statistics", "device", "80% of copy"),
    (f"{WEIGHTS}, Pama(), 64M tokens", WEIGHTS, "67108864", f"{WEIGHTS}, Pama()", "device", ""),
    (f"`{COMBINE}` (B, N), mask 512 x 4096, N=8", *EIGHT, COMBINE, "device", ""),
    ("the same, the whole call", *EIGHT, COMBINE, "eager", "40 µs"),
    ("the same, UPGrad, device", *EIGHT, f"{COMBINE}, UPGrad", "device", ""),
    ("the same, UPGrad, the whole call", *EIGHT, f"{COMBINE}, UPGrad", "eager", "40 µs"),
    (f"`{COMBINE}` (B, N), mask 512 x 128, N=32", *MANY, COMBINE, "device", ""),
    ("the same, UPGrad", *MANY, f"{COMBINE}, UPGrad", "device", ""),
    (GRAM_LOSS, PER_SEQUENCE, "", "pama_loss", "device", ""),
    ("the same, UPGrad", PER_SEQUENCE, "", "pama_loss, UPGrad", "device", ""),
    (SCORES_LOSS, PER_TOKEN, "", "pama_loss", "device", ""),
)
ONE, ALONE = "eager PyTorch, one objective", "eager PyTorch, scores and weights alone"
PEERS = {SCORES: ALONE, SUMS: ALONE, GRAM_LOSS: ONE, SCORES_LOSS: ONE}


def gpu(results: Path) -> str:
    """Both backends, eager PyTorch and the goal; the share of a policy step, and the wait for compilation."""
    path = results / "gpu.csv"
    rows = read(path)

    def found(work: str, case: str, contestant: str) -> dict[str, str]:
        matching = [
            r for r in rows
            if r["work"] == work and r["case"].startswith(case) and r["contestant"] == contestant
        ]  # fmt: skip
        if len(matching) != 1:
            raise ValueError(
                f"gpu.csv: expected one row of {work}, {case}, {contestant}, got {len(matching)}"
            )
        return matching[0]

    copy = found("ceiling", "", "copy of device memory, eager time")
    bandwidth = 2 * 2**30 / float(copy["microseconds"]) * 1e-3
    lines = ["| | CUDA C++ | Triton | eager PyTorch | goal |", "| --- | --- | --- | --- | --- |"]
    for title, work, case, contestant, kind, goal in ROWS:
        cells = []
        if not any(
            r["contestant"].startswith(f"{contestant}: ") and r["work"] == work and r["case"].startswith(case)
            for r in rows
        ):
            continue  # measured before this contestant was added
        for backend in ("cuda", "triton"):
            r = found(work, case, f"{contestant}: {backend}, {kind} time")
            cell = f"{float(r['microseconds']):,.1f} µs"
            if "64M" in title and r["gigabytes_per_second"]:
                cell += f" ({float(r['gigabytes_per_second']) / bandwidth:.0%} of copy)"
            cells.append(cell)
        peer = PEERS.get(title)
        beside = f"{float(found(work, case, f'{peer}, {kind} time')['microseconds']):,.1f} µs" if peer else ""
        lines.append(f"| {title} | {' | '.join(cells)} | {beside} | {goal} |")
    step = found("policy step", "", "step with pama_loss: cuda")
    share = [
        found("policy step", "", f"share of pama_loss with its gradient: {b}") for b in ("cuda", "triton")
    ]
    shares = " | ".join(f"{float(r['ratio']):.3%}" for r in share)
    lines.append(f"| share of a policy step of {step['case']} parameters | {shares} | | 0.5% |")
    for name, shown, goal in (
        ("first 3 steps", "first 3 steps", "5 s"),
        ("steps after them", "later steps", "0"),
    ):
        waits = [found("compilation waited for", "", f"{name}: {b}") for b in ("cuda", "triton")]
        cells = [f"{float(r['microseconds']) * 1e-6:.3f} s" for r in waits]
        lines.append(
            f"| waiting for compilation, lengths changing, {shown} | {' | '.join(cells)} | | {goal} |"
        )
    head = provenance_of(path)
    about = f"`{head['command']}`, {head['date']}, commit {head['commit']}: {head['note 1']}."
    ceiling = f"A copy of device memory moves {bandwidth:,.0f} GB/s."
    return "\n".join([about, ceiling, "", *lines])
