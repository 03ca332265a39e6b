"""A series of retrainings, one for each point of a grid of params: a queue on disk, and a page that compares them.

`.runs/series/<name>/series.json` says which points are done. The name is a digest of the experiments in it: the same
command goes on where a stopped or killed one was, and another params.yaml begins another series.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from cigpose.config import Config, public_params
from cigpose.files.atomic import claimed, clear_leftovers_in, write_json
from pipelines.lineage import digest_of
from pipelines.paths import RUNS
from pipelines.retraining.artifacts import Retrained
from pipelines.retraining.overrides import asked_config

FOLDER = RUNS / "series"
Axes = dict[str, list[Any]]
"""Key of params.yaml -> its values, one after the other."""
Retrain = Callable[[dict[str, Any]], tuple[bool, str, Retrained | None]]
"""Overrides -> whether the run went well, what was said, and what came out."""


class SeriesError(ValueError):
    """A grid that is none."""


@dataclass(kw_only=True)
class Point:
    """One retraining of a series."""

    values: dict[str, Any]
    """What it has of each axis, as it may be shown."""
    state: Literal["waiting", "running", "done", "failed"] = "waiting"
    message: str = ""
    experiment: str | None = None
    """DVC's name of the outcome; None where nothing had to be run."""
    metrics: dict[str, Any] = field(default_factory=dict)
    registered: dict[str, Any] = field(default_factory=dict)
    validation: list[tuple[float, float]] = field(default_factory=list)
    """Epoch and figure of each validation of the training."""
    seconds: float | None = None


def parse_axes(items: Sequence[str]) -> Axes:
    """`seed=0,1,2` of the command line as key and values, each as in params.yaml.

    Raises:
        SeriesError: it is none, or a key is named twice.
    """
    axes: Axes = {}
    for item in items:
        key, _, text = item.partition("=")
        try:
            values = yaml.safe_load(f"[{text}]")
        except yaml.YAMLError:
            values = []
        if not key or not values:
            raise SeriesError(f"--for-each {item}: expected KEY=VALUE,VALUE, such as --for-each seed=0,1,2.")
        if key in axes:
            raise SeriesError(f"--for-each {key}: named twice. Give all its values at once.")
        axes[key] = values
    return axes


class Series:
    """The points of a grid, and what is known of each."""

    def __init__(
        self, root: Path, axes: Axes, preset: str | None, overrides: Mapping[str, Any], asked: Any = None
    ) -> None:
        """Look up the series; nothing is written.

        Args:
            root: the project.
            axes: the grid; the last axis changes first.
            preset: in place of params.yaml.
            overrides: the same for all points.
            asked: what else is asked of each run, for the series' name.

        Raises:
            ConfigError: a key does not exist (with the nearest known one), or a value does not fit.
        """
        self.overrides = [
            {**overrides, **dict(zip(axes, point, strict=True))} for point in itertools.product(*axes.values())
        ]
        configs = [asked_config(root / "params.yaml", preset, each)[0] for each in self.overrides]
        self.config: Config = configs[0]
        name = digest_of([[config.to_mapping() for config in configs], list(axes), asked])
        self.axes = axes
        self.folder = root / FOLDER / name
        self.points = [Point(values={key: public_params(each[key], key) for key in axes}) for each in self.overrides]
        self._go_on()

    @property
    def page(self) -> Path:
        """The page that compares the runs."""
        return self.folder / "series.html"

    def _go_on(self) -> None:
        """Take over what an earlier command found; a point that was running when it was killed waits again."""
        with suppress(OSError, ValueError, KeyError, TypeError):
            known = json.loads((self.folder / "series.json").read_text(encoding="utf-8"))["points"]
            points = [Point(**about) for about in known]
            if [point.values for point in points] == [point.values for point in self.points]:
                self.points = points
        for point in self.points:
            if point.state != "done":
                point.state, point.message = "waiting", ""

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Be the only one who works at this series.

        Raises:
            ClaimedError: another process does.
        """
        with claimed(self.folder / "lock", "This series of retrainings"):
            clear_leftovers_in(self.folder)
            self._go_on()  # the last one who had it may have ended since
            yield

    def run(
        self, retrain: Callable[[dict[str, Any]], tuple[bool, str, Retrained | None]], changed: Callable[[Series], None]
    ) -> bool:
        """Run what is not done, one after the other; a failure does not keep the others from running.

        Args:
            retrain: runs one point.
            changed: called whenever something is known that was not.

        Returns: whether all are done.
        """
        for point, overrides in zip(self.points, self.overrides, strict=True):
            if point.state == "done":
                continue
            point.state, started = "running", time.monotonic()
            self._keep(changed)
            try:
                is_good, message, outcome = retrain(overrides)
            except BaseException:  # somebody stops the series: this point waits for the next command
                point.state = "waiting"
                self._keep(changed)
                raise
            point.state, point.message = "done" if is_good else "failed", message
            point.seconds = round(time.monotonic() - started, 1)
            if outcome is not None:
                point.experiment, point.validation = outcome.experiment, outcome.validation
                point.metrics, point.registered = outcome.metrics, outcome.registered
            self._keep(changed)
        return all(point.state == "done" for point in self.points)

    def _keep(self, changed: Callable[[Series], None]) -> None:
        write_json(self.folder / "series.json", {"points": [asdict(point) for point in self.points]})
        changed(self)
