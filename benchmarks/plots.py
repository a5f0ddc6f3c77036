"""Pictures from the CSVs: lines on logarithmic axes, with their names at the right end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

OURS = "#c1121f"

Series = dict[str, list[tuple[float, float]]]


@contextmanager
def figure(path: Path, panels: int) -> Iterator[Any]:
    """Panels that share their y axis, written to `path` at the end; none without matplotlib."""
    try:
        import matplotlib as mpl
    except ImportError as error:
        print(f"no plot: {error}")
        yield []
        return
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    drawn, axes = plt.subplots(1, panels, figsize=(6.2 * panels, 5.2), sharey=True, squeeze=False)
    yield list(axes[0])
    drawn.tight_layout(w_pad=9)
    drawn.subplots_adjust(right=0.86)
    drawn.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(drawn)
    print(f"wrote {path}")


def lines(axes: Any, series: Series, styles: Mapping[str, tuple[str, str]], gap: float = 1.36) -> None:
    """One line for each name, in its (color, marker); names without a style are left out.

    The label at the end of a line is its name up to a comma.
    """
    ends = []
    for name, points in series.items():
        if name not in styles:
            continue
        color, marker = styles[name]
        points = sorted(points)
        ours = color == OURS
        axes.plot(
            *zip(*points, strict=True),
            color=color,
            marker=marker,
            markersize=6 if ours else 4.5,
            linewidth=2.6 if ours else 1.3,
            zorder=3 if ours else 2,
        )
        ends.append((points[-1], name, color))
    last = 0.0
    for (x, y), name, color in sorted(ends, key=lambda end: end[0][1]):
        last = max(y, gap * last)  # labels that do not overlap
        axes.annotate(
            name.partition(",")[0],
            (x, last),
            xytext=(7, 0),
            textcoords="offset points",
            color=color,
            va="center",
            fontsize=9,
            annotation_clip=False,
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.minorticks_off()
    axes.grid(True, which="major", color="#dddddd", linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)
