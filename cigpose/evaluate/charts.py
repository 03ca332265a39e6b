"""Small charts as SVG text: grouped bars and a histogram. No plotting library, equal input gives equal bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

import numpy as np

from cigpose.draw import part_color

_INK, _FAINT = "#333333", "#dddddd"


def bars_svg(title: str, values: Mapping[str, Mapping[str, float]], *, width: int = 760) -> str:
    """Horizontal bars between 0 and 1, a group per row; values below 0 (nothing to measure) are written as such.

    Args:
        title: above the chart.
        values: row -> bar -> value. Rows are labelled, the first bar of a row is the strongest in colour.
        width: of the picture, in pixels.
    """
    left, bar_height, gap, top = 110, 15, 10, 44
    span = width - left - 70
    body, y = [], top
    for row, bars in values.items():
        color = _hex(part_color(row))
        body.append(_text(left - 8, y + bar_height * len(bars) / 2 + 4, row, anchor="end"))
        for i, (name, value) in enumerate(bars.items()):
            length = max(0.0, min(1.0, value)) * span
            body.append(
                f'<rect x="{left}" y="{y}" width="{length:.1f}" height="{bar_height - 2}" fill="{color}" '
                f'fill-opacity="{1 - 0.65 * i / max(len(bars), 1):.2f}"/>'
            )
            shown = f"{value:.3f}" if value >= 0 else "none"
            body.append(_text(left + length + 5, y + bar_height - 4, f"{shown} {name}", size=11))
            y += bar_height
        y += gap
    grid = []
    for i in range(6):
        x = left + span * i / 5
        grid.append(f'<line x1="{x:.1f}" y1="{top - 6}" x2="{x:.1f}" y2="{y}" stroke="{_FAINT}"/>')
        grid.append(_text(x, y + 14, f"{i / 5:.1f}", anchor="middle", size=11))
    return _svg(width, y + 24, title, [*grid, *body])


def histogram_svg(title: str, samples: Mapping[str, np.ndarray], *, bins: int = 40, width: int = 760) -> str:
    """Outlines of the distributions of several samples over their common range, each scaled to its own area.

    Args:
        title: above the chart.
        samples: name -> numbers; empty ones are left out.
        bins: of the common range.
        width: of the picture, in pixels.
    """
    samples = {name: numbers[np.isfinite(numbers)] for name, numbers in samples.items() if len(numbers)}
    left, top, height = 20, 44, 200
    span = width - left - 150
    if not samples:
        return _svg(width, top + height + 30, title, [_text(left, top + 20, "no values")])
    low = min(0.0, *(float(numbers.min()) for numbers in samples.values()))
    high = max(low + 1e-6, *(float(np.quantile(numbers, 0.999)) for numbers in samples.values()))
    edges = np.linspace(low, high, bins + 1)
    counts = {name: np.histogram(numbers, edges)[0] / len(numbers) for name, numbers in samples.items()}
    tallest = max(float(share.max()) for share in counts.values()) or 1.0
    body = [f'<line x1="{left}" y1="{top + height}" x2="{left + span}" y2="{top + height}" stroke="{_INK}"/>']
    for i, (name, share) in enumerate(counts.items()):
        points = _outline(share / tallest * height, left, top + height, span)
        color = _hex(part_color(name))
        body.append(
            f'<polygon points="{points}" fill="{color}" fill-opacity="0.15" stroke="{color}" stroke-width="1.5"/>'
        )
        body.append(f'<rect x="{left + span + 16}" y="{top + 18 * i}" width="12" height="12" fill="{color}"/>')
        body.append(_text(left + span + 34, top + 18 * i + 10, name, size=12))
    for i in range(6):
        value = low + (high - low) * i / 5
        body.append(_text(left + span * i / 5, top + height + 16, f"{value:.2f}", anchor="middle", size=11))
    return _svg(width, top + height + 28, title, body)


def _outline(heights: Sequence[float] | np.ndarray, left: float, base: float, span: float) -> str:
    step = span / len(heights)
    points = [(left, base)]
    for i, height in enumerate(heights):
        points += [(left + i * step, base - height), (left + (i + 1) * step, base - height)]
    points.append((left + span, base))
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _svg(width: float, height: float, title: str, body: Sequence[str]) -> str:
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height:.0f}" '
        f'viewBox="0 0 {width} {height:.0f}" font-family="sans-serif">'
    )
    paper = f'<rect width="{width}" height="{height:.0f}" fill="white"/>'
    return "\n".join([head, paper, _text(16, 24, title, size=15, bold=True), *body, "</svg>\n"])


def _text(x: float, y: float, text: str, *, anchor: str = "start", size: int = 13, bold: bool = False) -> str:
    weight = ' font-weight="bold"' if bold else ""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" fill="{_INK}"{weight}>'
        f"{escape(text)}</text>"
    )


def _hex(bgr: tuple[int, int, int]) -> str:
    return f"#{bgr[2]:02x}{bgr[1]:02x}{bgr[0]:02x}"
