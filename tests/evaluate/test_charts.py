from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from cigpose.evaluate import charts

NAMES = ("body", "left_hand", r"$\frac{<&>", "nur so")
FIGURES = {name: (0.5, 0.4, 0.6) for name in NAMES}
CHARTS = {
    "parts": lambda: charts.parts_chart(FIGURES),
    "no parts": lambda: charts.parts_chart({}),
    "precision": lambda: charts.precision_recall_chart(np.linspace(1, 0, 202).reshape(2, 101), np.array([0.5, 0.75])),
    "thresholds": lambda: charts.threshold_chart({name: np.ones(2) for name in NAMES}, np.array([0.5, 0.75])),
    "losses": lambda: charts.curve_chart(
        "$loss", "step", {name: ([1, 2], [900.0, 3.0]) for name in NAMES}, falling=True
    ),
    "figures": lambda: charts.curve_chart("AP", "epoch", {"body": ([1], [0.1])}, falling=False),
    "scores": lambda: charts.score_chart({"body": np.array([0.1, 0.5, np.nan, np.inf]), "face": np.zeros(0)}),
    "no scores": lambda: charts.score_chart({}),
    "kinds": lambda: charts.kinds_chart("Kinds", {name: dict.fromkeys(charts.KIND_COLORS, 0.2) for name in NAMES}),
}


@pytest.mark.parametrize("draw", CHARTS.values(), ids=CHARTS)
def test_a_chart_is_svg_the_same_each_time_with_ink_for_light_and_dark_pages(draw: object) -> None:
    text = draw()  # type: ignore[operator]
    root = ElementTree.fromstring(text)
    assert root.tag.endswith("svg") and "prefers-color-scheme:dark" in text
    assert charts.INK not in text.partition("</style>")[2] and "currentColor" in text
    assert "http" not in text.replace("http://www.w3.org/", "") and "<!DOCTYPE" not in text
    assert draw() == text  # type: ignore[operator]
