"""Plots as PNG files, drawn without pyplot, so that no window opens and the caller's own figures do not change."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from retro_np.evaluation.compare import LINES, ON, OUR_NAME, shown
from retro_np.evaluation.leakage import NO_LEAKAGE
from retro_np.files import replacing

# Okabe and Ito's colours, which colour-blind readers can tell apart.
COLOURS = dict(zip(LINES, ("#555555", "#E69F00", "#0072B2", "#CC79A7"), strict=True))


def plot_losses(runs: dict[str, list[dict[str, Any]]], path: Path | str) -> None:
    """Plot each run's training loss against steps, and its running mean over a twentieth of the steps."""
    with new_plot(path, "step", "training loss, nats per token") as axes:
        for name, log in runs.items():
            steps, losses = (np.array([line[key] for line in log]) for key in ("step", "loss"))
            colour = COLOURS.get(name)
            axes.plot(steps, losses, color=colour, alpha=0.2, linewidth=0.8)
            width = max(1, len(losses) // 20)
            means = [losses[max(0, stop - width) : stop].mean() for stop in range(1, len(losses) + 1)]
            axes.plot(steps, means, color=colour, label=name)


def plot_leakage(
    alphas: Sequence[float], curves: dict[str, list[float | None]], path: Path | str, model: str = OUR_NAME
) -> None:
    """Plot bpb(α) against α, one curve per condition. A point that is None is not drawn. Paper eq. 5.

    model: its name in the legend."""
    label = "α: largest allowed r(C), the longest run shared with a neighbour as a share of the chunk"
    with new_plot(path, label) as axes:
        for name, curve in curves.items():
            values = np.array(curve, float)  # None becomes NaN, which is not drawn.
            axes.plot(alphas, values, marker="o", markersize=3, color=COLOURS.get(name), label=shown(name, model))
        axes.axvline(NO_LEAKAGE, color="#999999", linewidth=0.8, linestyle=":")
        axes.annotate(" 12.5 %", (NO_LEAKAGE, 1), xycoords=("data", "axes fraction"), va="top", color="#666666")
        axes.xaxis.set_major_formatter(PercentFormatter(1))


def plot_bars(
    values: dict[str, Any], path: Path | str, label: str, *, scale: float = 1, notes: dict[str, str] | None = None,
    dots: dict[str, float | None] | None = None, limits: tuple[float, float] | None = None,
) -> None:  # fmt: skip
    """Plot horizontal bars from top to bottom, each in the colour of its model or condition. If `limits` leave out 0, a
    stroke marks each value instead, because bars that do not begin at 0 exaggerate their differences.

    values: name → a number or a `mean_and_spread`, whose seeds are drawn as dots. label, limits: of the axis. scale: a
    factor for all values. dots: name → another number, drawn as a dot. notes: name → text after the bar."""
    with new_plot(path, label, "") as axes:
        for row, (name, bar) in enumerate(values.items()):
            mean, marks = (bar["mean"], bar["seeds"]) if isinstance(bar, dict) else (bar, [(dots or {}).get(name)])
            marks = scale * np.array(marks, float)  # A missing dot becomes NaN, which is not drawn.
            colour = COLOURS.get(name, COLOURS[ON])
            if limits and limits[0] > 0:
                axes.plot([scale * mean] * 2, [row - 0.25, row + 0.25], color=colour)
            else:
                axes.barh(row, scale * mean, color=colour, alpha=0.5)
            axes.plot(marks, [row] * len(marks), "o", color=colour)
            if notes:
                end = max(0, scale * mean), row
                axes.annotate(notes[name], end, xytext=(6, 0), textcoords="offset points", va="center", fontsize=8)
        axes.axvline(0, color="#666666", linewidth=0.8)
        axes.set_yticks(range(len(values)), list(values), fontsize=8)
        axes.invert_yaxis()
        axes.set_xlim(limits)


@contextmanager
def new_plot(path: Path | str, xlabel: str, ylabel: str = "bits per byte", **properties: Any) -> Iterator[Axes]:
    """The axes of a new figure of the usual size. It is written when the block ends, unless that raises.

    path: the file, whose suffix is the format. properties: as in Matplotlib's `Axes.set`, for example xscale. There is
    a legend if anything has a label."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel=xlabel, ylabel=ylabel, **properties)
    yield axes
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    with replacing(path) as file:
        figure.savefig(file, dpi=150, format=Path(path).suffix[1:] or None)
