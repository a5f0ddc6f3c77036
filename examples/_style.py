"""The style of the examples' pictures: `plt.rcParams.update(STYLE)`."""

from __future__ import annotations

from typing import Any

INK, GREY = "#222222", "#8a8a8a"
STYLE: dict[str, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "xtick.color": GREY,
    "ytick.color": GREY,
    "grid.color": "#e8e8e8",
}
