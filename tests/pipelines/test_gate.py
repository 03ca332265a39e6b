"""A model that is better in one figure and loses a hand for it: when that counts, and how it is known."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from cigpose.evaluate.matches import Matches
from cigpose.evaluate.tables import MatchTables, paired_intervals
from pipelines.registry.gate import Decision, Rules, decide
from pipelines.registry.measurement import Measurement

RULES = Rules(metric="whole/AP", max_loss={"left_hand": 0.02}, max_robustness_loss=0.05)


def measured(whole: float, hand: float, width: float | None = None, **more: object) -> Measurement:
    intervals = {"left_hand": (hand - width, hand + width)} if width is not None else {}
    figures = {"whole/AP": whole, "left_hand/AP": hand}
    return Measurement(metrics=figures, data="d", protocol="{}", intervals=intervals, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("hand", "width", "paired", "verdict", "how"),
    [
        (0.30, None, None, "loses", "figures"),
        (0.39, None, None, "better", "figures"),
        (0.30, 0.02, None, "loses", "intervals"),
        (0.30, 0.09, None, "better", "intervals"),
        (0.30, 0.09, (-0.15, -0.05), "loses", "paired"),
        (0.30, 0.02, (-0.22, 0.01), "better", "paired"),
        (0.385, 0.001, (-0.02, -0.01), "better", "paired"),
        (0.50, 0.02, (0.08, 0.12), "better", "paired"),
        (-1.0, None, None, "loses", "figures"),
        (math.nan, None, None, "loses", "figures"),
    ],
    ids=[
        "a loss, nothing known of chance",
        "a loss that is allowed",
        "more than chance, from each interval",
        "chance explains it, from each interval",
        "more than chance, paired",
        "chance explains it, paired",
        "sure, but allowed",
        "a gain",
        "nothing measured any more",
        "no number",
    ],
)
def test_a_better_model_loses_if_it_loses_a_hand(hand, width, paired, verdict, how) -> None:
    intervals = {"left_hand": paired} if paired else None
    decision = decide(2, measured(0.6, hand, width), (1, measured(0.5, 0.4, width)), RULES, intervals)
    assert decision.verdict == verdict
    [change] = [change for change in decision.changes if change.part == "left_hand"]
    assert (change.how, change.is_loss) == (how, verdict == "loses")
    if verdict == "loses":
        assert "loses too much of left_hand: AP" in decision.text and "against 0.4000" in decision.text
    kept = Decision.from_tags(decision.tags())
    assert kept is not None and kept.tags() == decision.tags()


def test_a_part_without_a_limit_may_be_lost() -> None:
    rules = Rules(metric="whole/AP", max_loss={"face": 0.0})
    assert decide(2, measured(0.6, 0.1), (1, measured(0.5, 0.4)), rules).verdict == "better"


@pytest.mark.parametrize(
    ("ours", "theirs", "verdict"),
    [
        ({"whole": (0.6, 0.58, 0.62)}, {"whole": (0.8, 0.78, 0.82)}, "loses"),
        ({"whole": (0.6, 0.4, 0.8)}, {"whole": (0.8, 0.6, 0.95)}, "better"),
        ({"whole": (0.78, None, None)}, {"whole": (0.8, None, None)}, "better"),
        ({"whole": (0.6, None, None)}, {"whole": (0.8, None, None)}, "loses"),
        ({}, {"whole": (0.8, 0.78, 0.82)}, "better"),
    ],
    ids=["surely less robust", "chance", "allowed", "no intervals", "only one has it"],
)
def test_robustness_counts_where_both_have_it(ours, theirs, verdict) -> None:
    challenger, champion = measured(0.6, 0.4, robustness=ours), measured(0.5, 0.4, robustness=theirs)
    decision = decide(2, challenger, (1, champion), RULES)
    assert decision.verdict == verdict
    assert ("share of its AP left on spoilt pictures 0.6000 against 0.8000" in decision.text) == (verdict == "loses")


def tables(rng: np.random.Generator, hit_rate: float, hard: np.ndarray) -> MatchTables:
    """People of 60 pictures, found more seldom where a picture is hard."""
    image = rng.permutation(np.repeat(np.arange(60), 3))
    hit = rng.random((10, 180)) < hit_rate * (1 - hard[image])
    matches = Matches(
        thresholds=np.linspace(0.5, 0.95, 10),
        image=image,
        person=np.arange(180),
        truth=np.where(hit, 0, -1),
        hit=hit,
        counted=rng.random((10, 180)) < 0.95,
        truth_image=np.repeat(np.arange(60), 3),
        num_images=60,
    )
    return MatchTables(images=np.arange(100, 160), parts={"left_hand": matches})


def test_what_is_kept_of_an_evaluation_gives_the_same_figures_and_intervals(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    hard = rng.random(60)
    first, second = tables(rng, 0.9, hard), tables(rng, 0.7, hard)
    paths = [found.save(tmp_path / f"{i}.npz") for i, found in enumerate((first, second))]
    loaded = [MatchTables.load(path) for path in paths]
    for kept, found in zip(loaded, (first, second), strict=True):
        assert kept.parts["left_hand"].average_precision() == found.parts["left_hand"].average_precision()
        assert kept.intervals() == found.intervals()
    low, high = paired_intervals(*loaded)["left_hand"]
    difference = second.parts["left_hand"].average_precision() - first.parts["left_hand"].average_precision()
    assert low < difference < high < 0
    one, other = first.intervals()["left_hand"], second.intervals()["left_hand"]
    assert high - low < np.hypot(one[1] - one[0], other[1] - other[0])  # what is hard is hard for both
    assert paths[0].read_bytes() == first.save(tmp_path / "again.npz").read_bytes()
    with pytest.raises(ValueError, match="not the same"):
        paired_intervals(loaded[0], MatchTables(images=np.arange(60), parts={}))
    paths[0].write_bytes(b"PK\x03\x04 broken")
    with pytest.raises(ValueError, match="not a file of matches"):
        MatchTables.load(paths[0])
