"""Plots as PNG files: figures of their own, without pyplot, so that no window is asked for and nobody's is touched."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from retro_np.evaluation.leakage import NO_LEAKAGE

# Okabe & Ito's colours, told apart by the colour-blind too
COLOURS = {
    "baseline": "#555555",
    "RETRO[OFF]": "#E69F00",
    "RETRO[ON]": "#0072B2",
    "RETRO[ON], neighbours of others": "#CC79A7",
}


def plot_losses(runs: dict[str, list[dict]], path) -> None:
    """Training loss over steps, a line a run: each run's log, smoothed over a twentieth of it, the raw one behind."""
    figure, axes = figure_and_axes()
    for name, log in runs.items():
        steps = np.array([line["step"] for line in log])
        losses = np.array([line["loss"] for line in log])
        colour = COLOURS.get(name)
        axes.plot(steps, losses, color=colour, alpha=0.2, linewidth=0.8)
        width = max(1, len(losses) // 20)
        sums = np.cumsum(np.concatenate([[0.0], losses]))
        ends = np.arange(1, len(losses) + 1)
        begins = np.maximum(0, ends - width)
        axes.plot(steps, (sums[ends] - sums[begins]) / (ends - begins), color=colour, label=name)
    axes.set_xlabel("step")
    axes.set_ylabel("training loss, nats a token")
    axes.legend(frameon=False)
    finish(figure, axes, path)


def plot_leakage(alphas, curves: dict[str, list[float | None]], path) -> None:
    """bpb(α) over α, a line a model. Paper eq. 5 and its figure of filtered evaluation."""
    figure, axes = figure_and_axes()
    for name, figures in curves.items():
        there = [(alpha, value) for alpha, value in zip(alphas, figures, strict=True) if value is not None]
        axes.plot(*zip(*there, strict=True), marker="o", markersize=3, color=COLOURS.get(name), label=name)
    axes.axvline(NO_LEAKAGE, color="#999999", linewidth=0.8, linestyle=":")
    axes.annotate(" 12.5 %", (NO_LEAKAGE, 1), xycoords=("data", "axes fraction"), va="top", color="#666666")
    axes.set_xlabel("α: chunks whose longest run shared with a retrieved value is at most this share of a chunk")
    axes.set_ylabel("bits per byte")
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.legend(frameon=False)
    finish(figure, axes, path)


def plot_bars(values: dict[str, float], path, label: str, *, dots=None, notes=None, limits=None) -> None:
    """A bar a name, from the top: a model's or condition's own colour where it has one.

    label: of the axis; dots: name → values to mark on its bar; notes: name → a word behind it; limits: of the axis.
    """
    figure, axes = figure_and_axes()
    for place, (name, value) in enumerate(values.items()):
        colour = COLOURS.get(name, COLOURS["RETRO[ON]"])
        axes.barh(place, value, color=colour, alpha=0.5)
        marked = [dot for dot in (dots or {}).get(name, ()) if dot is not None]
        axes.plot(marked, [place] * len(marked), "o", color=colour)
        if notes:
            axes.annotate(
                notes[name], (max(0, value), place), xytext=(6, 0), textcoords="offset points", va="center", fontsize=8
            )
    axes.axvline(0, color="#666666", linewidth=0.8)
    axes.set_yticks(range(len(values)), list(values), fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(limits)
    axes.set_xlabel(label)
    finish(figure, axes, path)


def figure_and_axes():
    """A figure of the size that ours have, and its axes."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    return figure, figure.subplots()


def finish(figure, axes, path) -> None:
    """Write a figure as PNG, without a frame where nothing is."""
    axes.spines[["top", "right"]].set_visible(False)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
