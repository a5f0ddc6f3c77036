"""The demo's table, picture, files, and its blocks in README and docs."""

from __future__ import annotations

import json
import platform
import re
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
INK, GREY = "#222222", "#8a8a8a"
COLOURS = ("#0a6ebd", "#c2456b", "#3c8d5a")
T_95 = {11: 2.201}  # of Student's distribution, for the twelve held-out complaints


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def table(before: Tensor, after: Tensor) -> dict[str, list[list[float]]]:
    """Mean and half-width of the 95% interval over complaints, from (complaints, N); the gain is paired."""

    def interval(values: Tensor) -> list[list[float]]:
        half = T_95.get(len(values) - 1, 1.96) * values.std(0) / len(values) ** 0.5
        return [[round(m, 4), round(h, 4)] for m, h in zip(values.mean(0).tolist(), half.tolist(), strict=True)]

    return {"before": interval(before), "after": interval(after), "gain": interval(after - before)}


def summary(result: dict[str, Any]) -> str:
    lines = ["", "held-out complaints, 95% interval".ljust(36) + "".join(x.rjust(18) for x in ("before", "after", "gain"))]
    for kind, columns in result["table"].items():
        for i, name in enumerate(result["objectives"]):
            cells = ("{:+.2f} ± {:.2f}".format(*columns[x][i]) for x in ("before", "after", "gain"))
            lines.append(f"  {name}, {kind}".ljust(36) + "".join(cell.rjust(18) for cell in cells))
    lines.append("")
    for row in result["replies"]:
        lines += [row["complaint"], f"    before: {row['before']}", f"    after:  {row['after']}"]
    lines.append(
        f"\n{len(result['steps'])} steps, KL {result['kl']:.2f} nats per token; a step {result['step_s']:.1f} s "
        f"({result['step_cpu_s']:.1f} s of processor time on {result['threads']} threads), in pama_kernels "
        f"{result['kernel_ms']:.2f} ms ({result['kernel_percent']:.3f}%); in all {result['wall_s']:.0f} s, "
        f"{result['cpu_s']:.0f} s of processor time"
    )
    return "\n".join(lines)


def write(folder: Path, result: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "demo.json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    draw(folder / "demo.png", result)


def draw(path: Path, result: dict[str, Any]) -> None:
    """Rewards, weights, and covariance of each objective with the update, over the steps."""
    rows, names = result["steps"], result["objectives"]
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    for axis, what in zip(axes, ("reward", "weight", "covariance"), strict=True):
        for name, colour in zip(names, COLOURS, strict=True):
            axis.plot([row["step"] for row in rows], [row[f"{what}_{name}"] for row in rows], color=colour, label=name)
        axis.set(title=what, xlabel="step")
    figure.savefig(path, dpi=130)
    plt.close(figure)
