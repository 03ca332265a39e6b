"""The charts of a report, as SVG text by matplotlib: equal input gives equal bytes, and a dark page gets light ink."""

from __future__ import annotations

import io
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import NullFormatter, StrMethodFormatter

INK = "#3f3f46"
"""Of axes and text; `_svg` makes it follow the reader's colour scheme."""
DARK_INK = "#d4d4d8"
KIND_COLORS = {"good": "#94a3b8", "jitter": "#3b82f6", "inversion": "#f59e0b", "swap": "#a855f7", "miss": "#ef4444"}
PART_COLORS = {
    "whole": INK,
    "body": "#3b82f6",
    "foot": "#a855f7",
    "face": "#d97706",
    "left_hand": "#16a34a",
    "right_hand": "#ef4444",
}
_STEPS = ("#3b82f6", "#a855f7", "#ef4444", "#f59e0b")  # seen on white and on black
_OTHER_COLORS = ("#0891b2", "#db2777", "#65a30d", "#7c3aed")
_STYLE: dict[Any, Any] = {
    "svg.hashsalt": "cigpose",
    "text.parse_math": False,  # names are names, dollars and all
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "legend.fontsize": 9,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
    "grid.color": INK,
    "grid.alpha": 0.18,
    "grid.linewidth": 0.8,
    "savefig.transparent": True,
}
_SIZE = (4.5, 3.3)  # inches of 72 points; narrow enough to be read on a phone


def parts_chart(values: Mapping[str, tuple[float, float, float]]) -> str:
    """Bars of the AP per part with their intervals.

    Args:
        values: part -> AP, low, high; all in 0..1.
    """
    with _style():
        figure, axes = _figure("AP per part, with 95 % intervals", height=1.2 + 0.38 * len(values))
        for row, (part, (ap, low, high)) in enumerate(values.items()):
            axes.barh(row, ap, color=_colors(values)[part], height=0.62, alpha=0.85)
            axes.plot([low, high], [row, row], color=INK, linewidth=1.6, solid_capstyle="butt")
            axes.text(max(high, ap) + 0.015, row, f"{ap:.3f}", va="center", fontsize=9)
        axes.set_yticks(range(len(values)), [_words(part) for part in values])
        axes.set(xlim=(0, 1.1), xticks=np.linspace(0, 1, 6))
        axes.invert_yaxis()
        axes.grid(axis="x")
        return _svg(figure)


def precision_recall_chart(precision: np.ndarray, thresholds: np.ndarray) -> str:
    """Precision over recall at each OKS threshold.

    Args:
        precision: (T, 101), at recall 0, 0.01 .. 1.
        thresholds: (T,).
    """
    with _style():
        figure, axes = _figure("Precision and recall, by OKS threshold")
        colors = LinearSegmentedColormap.from_list("steps", _STEPS)(np.linspace(0, 1, len(thresholds)))
        for row, threshold, color in zip(precision, thresholds, colors, strict=True):
            axes.plot(np.linspace(0, 1, len(row)), row, color=color, linewidth=1.5, label=f"{threshold:.2f}")
        axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1.005), ylim=(0, 1.02))
        axes.grid()
        figure.legend(loc="outside right upper", handlelength=1.2)
        return _svg(figure)


def threshold_chart(values: Mapping[str, np.ndarray], thresholds: np.ndarray) -> str:
    """AP at each OKS threshold, a line per part.

    Args:
        values: part -> (T,) AP.
        thresholds: (T,).
    """
    with _style():
        figure, axes = _figure("AP by OKS threshold")
        for part, row in values.items():
            axes.plot(thresholds, row, color=_colors(values)[part], marker="o", markersize=3.5, label=_words(part))
        axes.set(xlabel="OKS threshold", ylabel="AP", ylim=(0, 1.02))
        axes.grid()
        figure.legend(loc="outside right upper", handlelength=1.2)
        return _svg(figure)


def curve_chart(
    title: str, x_label: str, curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], *, falling: bool
) -> str:
    """Lines over the course of a training.

    Args:
        title: above the chart.
        x_label: what the training is counted in.
        curves: name -> x, y.
        falling: losses, on a logarithmic scale; else figures in 0..1.
    """
    with _style():
        figure, axes = _figure(title)
        for name, (x, y) in curves.items():
            marker = "o" if len(x) < 40 else ""
            axes.plot(
                x, y, color=_colors(curves)[name], linewidth=1.3, marker=marker, markersize=3.5, label=_words(name)
            )
        axes.set_xlabel(x_label)
        if falling:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axes.yaxis.set_minor_formatter(NullFormatter())
        else:
            axes.set_ylim(0, 1.02)
        axes.grid()
        figure.legend(loc="outside right upper", handlelength=1.2)
        return _svg(figure)


def severity_chart(values: Mapping[str, Sequence[float]], severities: Sequence[int]) -> str:
    """What is retained of the AP by severity, a line per corruption.

    Args:
        values: corruption -> share of the clean AP at each severity.
        severities: from 1.
    """
    with _style():
        figure, axes = _figure("AP retained under corruptions")
        colors = LinearSegmentedColormap.from_list("steps", (*_STEPS, *_OTHER_COLORS))(np.linspace(0, 1, len(values)))
        for (name, row), color in zip(values.items(), colors, strict=True):
            axes.plot(severities, row, color=color, marker="o", markersize=3.5, linewidth=1.4, label=_words(name))
        axes.set(xlabel="severity", ylabel="share of the clean AP", xticks=severities, ylim=(0, 1.1))
        axes.grid()
        figure.legend(loc="outside right upper", handlelength=1.2)
        return _svg(figure)


def score_chart(samples: Mapping[str, np.ndarray], bins: int = 25) -> str:
    """Distributions of keypoint scores over their common range, an outline per part.

    Args:
        samples: part -> numbers; those that are not finite are left out.
        bins: of the range.
    """
    samples = {name: numbers[np.isfinite(numbers)] for name, numbers in samples.items()}
    samples = {name: numbers for name, numbers in samples.items() if len(numbers)}
    high = max((float(np.quantile(numbers, 0.999)) for numbers in samples.values()), default=1.0)
    edges = np.linspace(0, max(high, 1e-6), bins + 1)
    with _style():
        figure, axes = _figure("Keypoint scores")
        for name, numbers in samples.items():
            share = np.histogram(numbers, edges)[0] / len(numbers)
            axes.stairs(share, edges, color=_colors(samples)[name], linewidth=1.4, label=_words(name))
        axes.set(xlabel="score", ylabel="share of the keypoints", xlim=(0, edges[-1]))
        axes.grid()
        if samples:
            figure.legend(loc="outside right upper", handlelength=1.2)
        return _svg(figure)


def kinds_chart(title: str, values: Mapping[str, Mapping[str, float]]) -> str:
    """Stacked bars of the kinds of error, a bar per part or keypoint.

    Args:
        title: above the chart.
        values: name -> kind -> share; the shares of a bar add up to 1.
    """
    with _style():
        figure, axes = _figure(title, height=1.4 + 0.27 * len(values))
        for row, shares in enumerate(values.values()):
            starts = itertools.accumulate(shares.values(), initial=0.0)
            for (kind, share), start in zip(shares.items(), starts, strict=False):
                axes.barh(row, share, left=start, color=KIND_COLORS[kind], height=0.72)
        axes.set_yticks(range(len(values)), [_words(name) for name in values])
        axes.set(xlim=(0, 1), xticks=np.linspace(0, 1, 6))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:.0%}"))
        axes.invert_yaxis()
        handles = [Patch(color=color, label=kind) for kind, color in KIND_COLORS.items()]
        figure.legend(
            handles=handles, loc="outside lower center", ncols=len(handles), handlelength=0.9, columnspacing=1
        )
        return _svg(figure)


def _style() -> Any:
    return mpl.rc_context(_STYLE)


def _figure(title: str, height: float = _SIZE[1]) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(_SIZE[0], height), layout="constrained")
    axes = figure.subplots()
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    return figure, axes


def _colors(names: Mapping[str, Any]) -> dict[str, str]:
    """A colour for each name, the same for a part in every chart."""
    others = itertools.cycle(_OTHER_COLORS)
    return {name: PART_COLORS.get(name) or next(others) for name in names}


def _words(name: str) -> str:
    return name.replace("_", " ")


def _svg(figure: Figure) -> str:
    """The SVG of a figure, its ink light where the reader prefers dark pages; nothing in it tells time or versions."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    start = text.index(">", text.index("<svg ")) + 1
    ink = f"svg{{color:{INK}}}@media(prefers-color-scheme:dark){{svg{{color:{DARK_INK}}}}}"
    return text[text.index("<svg ") : start] + f"<style>{ink}</style>" + text[start:].replace(INK, "currentColor")
