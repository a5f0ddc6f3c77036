"""The demo's table, picture and files, and its blocks in README.md and docs/examples.md."""

from __future__ import annotations

import json
import platform
import re
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from _style import GREY, INK, STYLE
from matplotlib.axes import Axes
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
PAGES = {"README.md": 3, "docs/examples.md": None}  # how many of the held-out complaints, the first ones
COLOURS = ("#0a6ebd", "#c2456b", "#3c8d5a")
COLUMNS = ("before", "after", "gain")


def processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


# --- figures --------------------------------------------------------------------------------------


def intervals(values: Tensor, draws: int = 10_000) -> list[list[float]]:
    """Mean and 95% bootstrap interval over the rows of (complaints, N): [mean, low, high] for each column."""
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randint(len(values), (draws, len(values)), generator=generator)
    limits = torch.tensor([0.025, 0.975], dtype=values.dtype)
    low, high = values[chosen].mean(1).quantile(limits, dim=0)
    return [[round(x, 4) for x in row] for row in torch.stack([values.mean(0), low, high], 1).tolist()]


def table(before: Tensor, after: Tensor) -> dict[str, list[list[float]]]:
    """`intervals` over complaints; that of the gain is paired."""
    return {"before": intervals(before), "after": intervals(after), "gain": intervals(after - before)}


def _cell(mean: float, low: float, high: float) -> str:
    return f"{mean:.2f} [{low:.2f}, {high:.2f}]"


def _rows(result: dict[str, Any], kind: str) -> list[list[str]]:
    columns = result["table"][kind]
    return [
        [name, *(_cell(*columns[column][i]) for column in COLUMNS)]
        for i, name in enumerate(result["objectives"])
    ]


def facts(result: dict[str, Any]) -> str:
    """One paragraph of numbers."""
    steps, names = result["steps"], result["objectives"]
    below = {name: sum(row[f"covariance_{name}"] < 0 for row in steps) for name in names}
    sacrificed = ", ".join(f"{name} in {count}" for name, count in below.items() if count) or "none"
    return (
        f"{len(steps)} steps of {result['settings']['prompts']} prompts x {result['settings']['group']} "
        f"completions; KL to the initial policy at the end: {result['kl']:.2f} nats per token. Of the "
        f"{len(steps)} steps, those with a negative covariance between an objective and the update: "
        f"{sacrificed}. A step took {result['step_s']:.1f} s ({result['step_cpu_s']:.0f} s of CPU time, "
        f"threads: {result['threads']}, {result['dtype']}), of which {result['kernel_ms']:.1f} ms "
        f"({result['kernel_percent']:.1g}%) in `pama_kernels`; the whole run took {result['wall_s']:.0f} s "
        f"({result['cpu_s']:.0f} s of CPU time)."
    )


def _title(kind: str) -> str:
    return f"mean reward of {kind} completions [95%]"


def summary(result: dict[str, Any]) -> str:
    """For the terminal."""
    lines = []
    for row in result["replies"]:
        lines += ["", row["complaint"], f"    before: {row['before']}", f"    after:  {row['after']}"]
    for kind in result["table"]:
        lines.append(f"\n{_title(kind)}".ljust(46) + "".join(x.rjust(22) for x in COLUMNS))
        lines += [
            f"  {name}".ljust(45) + "".join(x.rjust(22) for x in cells)
            for name, *cells in _rows(result, kind)
        ]
    return "\n".join([*lines, "", facts(result)])


# --- files ----------------------------------------------------------------------------------------


def _markdown(head: list[str], rows: list[list[str]]) -> str:
    escaped = [[cell.replace("|", r"\|") for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *escaped])


def reply_table(result: dict[str, Any], number: int | None = None) -> str:
    rows = [[row["complaint"], row["before"], row["after"]] for row in result["replies"][:number]]
    return _markdown(["held-out complaint", "before", "after"], rows)


def score_table(result: dict[str, Any], kind: str) -> str:
    return _markdown([_title(kind), *COLUMNS], _rows(result, kind))


def page(result: dict[str, Any]) -> str:
    """demo.md: everything except the numbers of the picture."""
    parts = [
        "# The demo's completions for all held-out complaints",
        f"Made by `{result['command']}`. Greedy decoding; none is left out.",
        reply_table(result),
        score_table(result, "sampled"),
        score_table(result, "greedy"),
        facts(result),
    ]
    return "\n\n".join(parts) + "\n"


def write(folder: Path, result: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result, indent=1, ensure_ascii=False)
    (folder / "demo.json").write_text(text + "\n", encoding="utf-8")
    (folder / "demo.md").write_text(page(result), encoding="utf-8")
    draw(folder / "demo.png", result)


def block(result: dict[str, Any], number: int | None) -> str:
    """What README and docs show."""
    return "\n\n".join([reply_table(result, number), score_table(result, "sampled"), facts(result)])


def filled(text: str, content: str) -> str:
    """The page with the demo's block replaced."""
    pattern = r"(<!-- demo -->\n).*?(\n<!-- end -->)"
    if not re.search(pattern, text, flags=re.DOTALL):
        raise ValueError("page: expected a block between <!-- demo --> and <!-- end -->, found none")
    return re.sub(pattern, lambda found: found[1] + content + found[2], text, flags=re.DOTALL)


def write_docs(folder: Path, root: Path = ROOT) -> None:
    """Picture, page, README and docs from demo.json."""
    result = json.loads((folder / "demo.json").read_text(encoding="utf-8"))
    write(folder, result)
    for name, number in PAGES.items():
        path = root / name
        path.write_text(filled(path.read_text(encoding="utf-8"), block(result, number)), encoding="utf-8")


# --- picture --------------------------------------------------------------------------------------


def draw(path: Path, result: dict[str, Any]) -> None:
    """Rewards, weights, and the covariance of each objective with the update, over the steps."""
    plt.rcParams.update({**STYLE, "axes.titlesize": 11})
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.9), layout="constrained")
    name = result["settings"]["model"] or "SmolLM2-135M-Instruct"
    figure.suptitle(
        f"{name}, three rewards: {result['settings']['group']} completions for each of "
        f"{result['settings']['prompts']} complaints per step",
        x=0.01,
        ha="left",
        fontsize=12,
        color=INK,
    )
    for axis in axes:
        axis.grid(True, linewidth=0.8)
        axis.set_axisbelow(True)
    rows, names = result["steps"], result["objectives"]
    _lines(axes[0], rows, names, "reward", smooth=5)
    axes[0].set(title="mean reward (line: mean of 5 steps)", xlabel="step")
    _lines(axes[1], rows, names, "weight")
    axes[1].set(title="weights of the rule", xlabel="step", ylim=(0, 1))
    _lines(axes[2], rows, names, "covariance")
    axes[2].axhline(0, color=INK, lw=1)
    axes[2].set(title="covariance with the update", xlabel="step")
    low, high = axes[2].get_ylim()
    axes[2].set_ylim(min(low, -high / 6), high)
    below = {"xytext": (0, -4), "textcoords": "offset points", "va": "top", "color": GREY, "fontsize": 9}
    axes[2].annotate("below 0: decreases", (rows[0]["step"], 0), **below)
    figure.legend(*axes[1].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _lines(axis: Axes, rows: list[dict[str, float]], names: list[str], what: str, smooth: int = 1) -> None:
    steps = [row["step"] for row in rows]
    for name, colour in zip(names, COLOURS, strict=True):
        values = [row[f"{what}_{name}"] for row in rows]
        if smooth > 1:
            axis.plot(steps, values, "o", color=colour, ms=3, alpha=0.5)
        windows = (values[max(0, i + 1 - smooth) : i + 1] for i in range(len(values)))
        axis.plot(steps, [sum(window) / len(window) for window in windows], color=colour, lw=2, label=name)
