from __future__ import annotations

import json
import os
import re
import shlex
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from toy_stages import make_toy, stage_group, wait_for

from cigpose.config import Config
from cigpose.config.params_file import write_params
from cigpose.config.schema import ConfigError
from cigpose.files.atomic import ClaimedError
from pipelines import processes, retrain
from pipelines.retraining.artifacts import Retrained
from pipelines.retraining.series import Series, SeriesError, parse_axes
from pipelines.retraining.series_page import write_series_page


@pytest.fixture
def root(project: Path, config: Config) -> Path:
    write_params(config, project / "params.yaml")
    return project


def outcome(number: float) -> Retrained:
    return Retrained(
        experiment=f"retrain-{number}",
        metrics={"whole": {"AP": number, "AR": 0.7}, "body": {"AP": 0.8}},
        registered={"decision_text": f"<toy> has {number}", "url": "http://127.0.0.1:5000/#/x"},
        validation=[(1, number / 2), (3, number)],
        links={},
    )


def test_values_of_an_axis_are_as_in_params_yaml() -> None:
    axes = parse_axes(
        ["seed=0,1,2", "augmentation.stage1.scale_range=[0.5, 1.5],[0.9, 1.1]", "evaluate.flip_test=true"]
    )
    assert axes == {
        "seed": [0, 1, 2],
        "augmentation.stage1.scale_range": [[0.5, 1.5], [0.9, 1.1]],
        "evaluate.flip_test": [True],
    }


@pytest.mark.parametrize("items", [["seed"], ["seed="], ["=1"], ["seed=[1"], ["seed=1", "seed=2"]])
def test_what_is_no_axis_is_refused(items: list[str]) -> None:
    with pytest.raises(SeriesError, match=r"^--for-each .*(expected KEY=VALUE,VALUE|named twice)"):
        parse_axes(items)


def test_a_wrong_key_or_value_stops_the_command_before_anything_runs(root: Path, capsys, monkeypatch) -> None:
    with pytest.raises(ConfigError, match=r"train\.epoch: unknown key\. Did you mean 'train\.epochs'"):
        Series(root, parse_axes(["train.epoch=1,2"]), None, {})
    monkeypatch.setattr(retrain, "ROOT", root)
    assert retrain.main(["--for-each", "train.epochs=1,many"]) == 1
    assert re.fullmatch(r"retrain: train\.epochs: expected int, got 'many'\.\n", capsys.readouterr().err)
    assert not (root / ".runs").exists()


def test_a_stopped_series_goes_on_with_what_is_not_done_and_its_page_compares_the_runs(root: Path) -> None:
    axes = parse_axes(["seed=0,1", "train.epochs=4,6"])
    asked: list[dict[str, Any]] = []

    def run_until_stopped(overrides: dict[str, Any]) -> tuple[bool, str, Retrained | None]:
        asked.append(overrides)
        if len(asked) == 2:
            return False, "train: the disk is full & so on.", None
        if len(asked) == 3:
            raise KeyboardInterrupt
        return True, "done", outcome(0.5)

    series = Series(root, axes, None, {"evaluate.batch": 8})
    with pytest.raises(KeyboardInterrupt), series.alone():
        series.run(run_until_stopped, write_series_page)
    assert [each["seed"] for each in asked] == [0, 0, 1] and all(each["evaluate.batch"] == 8 for each in asked)
    page = series.page.read_text()
    assert "1 of 4 runs are done" in page and "train: the disk is full &amp; so on." in page

    again, rest = Series(root, axes, None, {"evaluate.batch": 8}), []
    assert again.folder == series.folder
    with again.alone():
        with pytest.raises(ClaimedError, match="This series of retrainings is running already"):
            again.alone().__enter__()
        assert again.run(lambda each: rest.append(each) or (True, "", outcome(0.5 + len(rest) / 10)), write_series_page)
    assert rest == [
        {"evaluate.batch": 8, "seed": seed, "train.epochs": epochs} for seed, epochs in ((0, 6), (1, 4), (1, 6))
    ]
    page = again.page.read_text()
    assert "4 of 4 runs are done" in page and "&lt;toy&gt; has 0.8" in page and page.count("<polyline") == 4
    best = page[page.index('<tr class="best">') :]
    assert page.count('<tr class="best">') == 1 and "0.8000" in best and "dvc exp apply retrain-0.8" in best
    assert re.search(r"<td>seed</td><td>0</td><td>2</td><td>0\.5500</td>", page), "the mean over a seed's runs"
    assert "src=" not in page and "<script" not in page and "<link" not in page

    write_params(Series(root, {"seed": [3]}, None, {"registry.margin": 0.1}).config, root / "params.yaml")
    assert Series(root, axes, None, {"evaluate.batch": 8}).folder != series.folder, "another params.yaml"


def test_a_point_that_was_running_when_the_series_was_killed_waits_again(root: Path) -> None:
    series = Series(root, {"seed": [0, 1]}, None, {})
    with series.alone():
        series.run(lambda each: (True, "", outcome(0.5)), lambda _: None)
    file = series.folder / "series.json"
    points = json.loads(file.read_text())
    points["points"][1]["state"] = "running"
    file.write_text(json.dumps(points))
    half = file.with_name(".series.json.0badcafe.part")
    half.write_text("{")
    with Series(root, {"seed": [0, 1]}, None, {}).alone():
        assert not half.exists()
    assert [point.state for point in Series(root, {"seed": [0, 1]}, None, {}).points] == ["done", "waiting"]


def is_gone(group: int) -> bool:
    return not processes.group_members(group)


@pytest.mark.slow
@pytest.mark.parametrize(
    "number",
    [
        signal.SIGINT,
        pytest.param(
            signal.SIGTERM,
            marks=pytest.mark.skipif("CIGPOSE_OUTAGES" not in os.environ, reason="set CIGPOSE_OUTAGES=1"),
        ),
    ],
)
def test_a_series_that_is_stopped_says_so_on_its_page_and_leaves_no_process(
    project: Path, config: Config, number: signal.Signals
) -> None:
    """By Ctrl-C where a shell's `&` had turned that off, and by SIGTERM to its process alone."""
    toy = make_toy(project, config)
    (toy / "control/slow").write_text("train")
    command = shlex.join([sys.executable, "-m", "pipelines.retrain", "--for-each", "seed=0,1"])
    with (toy / "series.log").open("w") as log:
        series = processes.start(["sh", "-c", f"trap '' INT; exec {command}"], cwd=toy, output=log)
    try:
        stage = stage_group(toy)
        (page,) = toy.glob(".runs/series/*/series.html")
        assert 'class="running"' in page.read_text()
        began = time.monotonic()
        if number == signal.SIGTERM:
            os.kill(series.pid, number)
        else:
            os.killpg(series.pid, number)
        assert series.wait(90) == 128 + number, (toy / "series.log").read_text()
        assert time.monotonic() - began < 60, "its server was there to be told"
        assert 'class="running"' not in page.read_text() and "0 of 2 runs are done" in page.read_text()
        assert is_gone(stage)
        wait_for(lambda: is_gone(series.pid), timeout_s=10)  # Prefect's own server is one of the group
    finally:
        processes.stop_group(series)
    states = [point["state"] for point in json.loads(page.with_name("series.json").read_text())["points"]]
    assert states == ["waiting", "waiting"]
