"""The page of a series: its runs side by side, on one HTML page that needs nothing beside it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from cigpose.files.atomic import write_text
from pipelines.retraining.series import Point, Series

TEMPLATE = "series.html.j2"
_COLORS = ("#3b82f6", "#ef4444", "#16a34a", "#d97706", "#a855f7", "#0891b2", "#db2777", "#65a30d")
_WIDTH, _HEIGHT, _MARGIN = 640, 260, 36  # of the chart, in its own units


def write_series_page(series: Series) -> None:
    """Write the page of a series as it stands, whole."""
    loader = FileSystemLoader(Path(__file__).parent)
    page = Environment(loader=loader, autoescape=True, undefined=StrictUndefined).get_template(TEMPLATE)
    metric = series.config.evaluate.metric
    values = [value_of(point, metric) for point in series.points]
    known = [value for value in values if value is not None]
    best = max(known, default=None)
    parts = list(dict.fromkeys(part for point in series.points for part in point.metrics))
    rows = [
        {
            "number": number,
            "color": _COLORS[(number - 1) % len(_COLORS)],
            "values": [_shown(value) for value in point.values.values()],
            "point": point,
            "value": _figure(value),
            "share": 100 * value / best if value is not None and best else 0,
            "is_best": value is not None and value == best and len(known) > 1,
            "parts": [_figure(point.metrics.get(part, {}).get("AP")) for part in parts],
        }
        for number, (point, value) in enumerate(zip(series.points, values, strict=True), start=1)
    ]
    text = page.render(
        name=series.config.name,
        metric=metric,
        axes=list(series.axes),
        parts=parts,
        rows=rows,
        done=sum(point.state == "done" for point in series.points),
        by_axis=[group for key in series.axes for group in _groups(series.points, key, metric)],
        curves=_curves(series.points),
        size=(_WIDTH, _HEIGHT),
    )
    write_text(series.page, text)


def value_of(point: Point, metric: str) -> float | None:
    """The figure `<part>/<figure>` that models are compared by."""
    part, _, figure = metric.partition("/")
    value = point.metrics.get(part, {}).get(figure)
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def _groups(points: Sequence[Point], key: str, metric: str) -> list[dict[str, Any]]:
    """Mean and spread of the figure over the runs that share a value of one axis; none where no two do."""
    by_value: dict[str, list[float]] = {}
    for point in points:
        if (value := value_of(point, metric)) is not None:
            by_value.setdefault(_shown(point.values[key]), []).append(value)
    if all(len(found) == 1 for found in by_value.values()):
        by_value = {"any": [value for found in by_value.values() for value in found]}
    return [
        {"key": key, "value": value, "runs": len(found), "mean": _figure(statistics.mean(found)),
         "deviation": _figure(statistics.stdev(found)) if len(found) > 1 else "",
         "range": f"{min(found):.4f} to {max(found):.4f}"}
        for value, found in by_value.items() if len(found) > 1
    ]  # fmt: skip


def _curves(points: Sequence[Point]) -> dict[str, Any] | None:
    """The validations of all trainings as lines of one chart; None where there are none."""
    curves = [[(x, y) for x, y in point.validation if y >= 0] for point in points]
    everything = [place for curve in curves for place in curve]
    if not everything:
        return None
    left, right = min(x for x, _ in everything), max(x for x, _ in everything)
    low, high = min(y for _, y in everything), max(y for _, y in everything)
    across, up = (_WIDTH - 2 * _MARGIN) / (right - left or 1), (_HEIGHT - 2 * _MARGIN) / (high - low or 1)

    def place(x: float, y: float) -> tuple[float, float]:
        return round(_MARGIN + (x - left) * across, 1), round(_HEIGHT - _MARGIN - (y - low) * up, 1)

    lines = [
        {"color": _COLORS[i % len(_COLORS)], "places": [place(*each) for each in curve]}
        for i, curve in enumerate(curves)
        if curve
    ]
    return {"lines": lines, "low": f"{low:.3f}", "high": f"{high:.3f}", "left": f"{left:g}", "right": f"{right:g}"}


def _shown(value: Any) -> str:
    return ", ".join(f"{key}: {item}" for key, item in value.items()) if isinstance(value, Mapping) else str(value)


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
