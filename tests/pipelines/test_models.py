"""`cigpose models`: what it prints, what it moves, and how it ends."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from mlflow import MlflowClient
from train_stage import Stage

from cigpose.config import Config, config_from_mapping, load_params
from cigpose.config.params_file import write_params
from pipelines import register
from pipelines.command import main
from pipelines.registry.gate import Rules
from pipelines.registry.measurement import Measurement
from pipelines.registry.versions import Registry
from pipelines.tracking.address import connect

MODEL = "cigpose-quickstart"


@pytest.fixture
def client(project: Path, config: Config) -> MlflowClient:
    write_params(config, project / "params.yaml")
    return connect(f"sqlite:///{project}/mlflow.db")


@pytest.fixture
def add(client: MlflowClient) -> Callable[..., str]:
    """Settle a version without files: `add(whole=0.5, left_hand=0.4)` gives the gate's verdict."""

    def settle(**figures: float) -> str:
        registry = Registry(client, MODEL)
        registry.ensure("")
        metrics = {f"{part}/AP": value for part, value in figures.items()}
        ends = {part: (value - 0.01, value + 0.01) for part, value in figures.items()}
        evaluation = Measurement(metrics=metrics, data="d", protocol="{}", intervals=ends)
        version = client.create_model_version(MODEL, "s3://nowhere/model", tags=evaluation.tags())
        rules = Rules(metric="whole/AP", max_loss={"left_hand": 0.02})
        return registry.settle(int(version.version), evaluation, rules).verdict

    return settle


def champion(client: MlflowClient) -> int:
    return int(client.get_model_version_by_alias(MODEL, "champion").version)


def test_versions_are_listed_shown_and_compared(add, client, capsys) -> None:
    assert [add(whole=0.5, left_hand=0.4), add(whole=0.6, left_hand=0.3)] == ["first", "loses"]
    assert main(["models", "list", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [(facts["version"], facts["aliases"], facts["value"]) for facts in listed] == [
        (2, ["challenger"], 0.6),
        (1, ["champion"], 0.5),
    ]
    assert main(["models", "list"]) == 0
    assert "0.5900 to" not in (text := capsys.readouterr().out) and "0.590 to 0.610" in text and "loses" in text
    assert main(["models", "show", "challenger"]) == 0
    text = capsys.readouterr().out
    assert "version 2" in text and "left_hand: AP 0.3000 against 0.4000 (95 % interval of the difference -0.114" in text
    assert main(["models", "compare", "1", f"models:/{MODEL}@challenger", "--json"]) == 0
    changes = json.loads(capsys.readouterr().out)["changes"]
    assert [(change["part"], change["how"], change["is_loss"]) for change in changes] == [
        ("whole", "intervals", False),
        ("left_hand", "intervals", True),
    ]


def test_versions_of_two_models_are_compared_whatever_their_numbers(add, client, capsys) -> None:
    add(whole=0.5)
    Registry(client, "other").ensure("")
    theirs = Measurement(metrics={"whole/AP": 0.4}, data="d", protocol="{}", intervals={})
    client.create_model_version("other", "s3://nowhere/model", tags=theirs.tags())
    assert main(["models", "compare", "models:/other/1", "champion", "--json"]) == 0
    compared = json.loads(capsys.readouterr().out)
    (change,) = compared["changes"]
    assert (compared["first"], compared["second"]) == ("other 1", f"{MODEL} 1")
    assert (change["theirs"], change["ours"], change["how"]) == (0.4, 0.5, "figures")


def test_a_version_is_promoted_with_the_gate_or_against_it_and_rolled_back(add, client, capsys) -> None:
    for whole, hand in ((0.5, 0.4), (0.6, 0.4), (0.7, 0.3), (-1.0, 0.0)):
        add(whole=whole, left_hand=hand)
    assert champion(client) == 2
    assert main(["models", "promote", "3"]) == 1
    assert "loses too much of left_hand" in (said := capsys.readouterr().err) and "`--anyway`" in said
    assert main(["models", "promote", "4", "--anyway"]) == 1
    assert "nothing it can do was measured" in capsys.readouterr().err
    assert champion(client) == 2
    assert main(["models", "promote", "3", "--anyway"]) == 0
    tags = client.get_model_version(MODEL, "3").tags
    assert (champion(client), tags["decision"]) == (3, "by_hand") and "loses too much" in tags["decision.text"]
    for expected in (2, 1):
        assert main(["models", "rollback"]) == 0
        assert champion(client) == expected
    assert main(["models", "rollback"]) == 1
    assert "is the first champion" in capsys.readouterr().err
    rolled_back = ["rolled_back" in client.get_model_version(MODEL, number).tags for number in "123"]
    assert rolled_back == [False, True, True]
    kept = Measurement.from_tags(client.get_model_version(MODEL, "2").tags)
    assert Registry(client, MODEL).settle(2, kept, Rules(metric="whole/AP")).verdict == "rolled_back"
    assert main(["models", "rollback", "--to", "3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["aliases"] == ["champion"]
    assert champion(client) == 3


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["show", "9"], 1, "has no version 9"),
        (["show", "nobody"], 1, "has no version nobody. The newest: 1; aliases: champion."),
        (["compare", "1", "champion"], 1, "both are version 1"),
        (["list", "--name", "other"], 1, "no model of that name is registered"),
        (["list", "--params", "none.yaml"], 1, "none.yaml: not found"),
        (["pull", "models:/a/b/c", "DIR"], 1, "expected models:/NAME@ALIAS or models:/NAME/VERSION"),
        (["pull", "1", "."], 1, "not written over"),
        (["compare", "1"], 2, "required: B"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(add, capsys, arguments: list[str], code: int, said: str) -> None:
    add(whole=0.5)
    try:
        assert main(["models", *arguments]) == code
    except SystemExit as end:
        assert end.code == code
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error
    assert code == 2 or error.count("\n") == 1


def test_who_only_looks_makes_no_database(project: Path, config: Config, capsys) -> None:
    write_params(config, project / "params.yaml")
    (project / "mlflow.db").unlink()
    assert main(["models", "list"]) == 1
    assert "mlflow.db: no registry there. `dvc repro` in the project's folder makes it" in capsys.readouterr().err
    assert not list(project.glob("mlflow.db*"))


@pytest.mark.slow
def test_what_is_pulled_predicts(project: Path, trained, config: Config, capsys) -> None:
    trained(config, seed=1, whole_ap=0.5)
    register.register(config, project)
    assert main(["models", "pull", f"models:/{MODEL}@champion", "pulled"]) == 0
    assert {"README.md", "model.onnx", "params.yaml", "pictures", "report.html"} <= set(
        path.name for path in (project / "pulled").iterdir()
    )
    cv2.imwrite("people.jpg", np.zeros((80, 60, 3), np.uint8))
    assert main(["predict", "people.jpg", "--model", "pulled", "--out", "out", "--no-drawings"]) == 0
    assert len(json.loads((project / "out/poses.json").read_text())) == 1
    assert main(["models", "pull", "1", "pulled"]) == 1
    assert "not written over" in capsys.readouterr().err


@pytest.mark.slow
def test_a_champion_measured_again_is_compared_again(
    project: Path, stage: Stage, trained, measure, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The recipe of docs/operations.md: `evaluate` was changed, and nothing is trained for it."""
    stage.params()
    config = load_params(stage.folder / "params.yaml")
    values = config.to_mapping()
    changed = config_from_mapping(values | {"evaluate": values["evaluate"] | {"person_score": "keypoints"}})
    for seed, protocol in ((1, config), (2, changed)):
        trained(protocol, seed=seed, whole_ap=0.5)
        shutil.copytree(stage.folder / "data/shards", project / "data/shards", dirs_exist_ok=True)
        measure(project, protocol, {"whole": {"AP": 0.5}})
        registered = register.register(protocol, project)
    assert registered["decision"] == "not_comparable" and "`cigpose models evaluate 1`" in registered["decision_text"]
    measured: list[tuple[bytes, str]] = []  # the file is no network here: what is made of one, test_exported.py shows

    def figures(exported: Path, config: Config, shards: Path) -> dict[str, float]:
        measured.append((exported.read_bytes(), config.evaluate.person_score))
        return {"whole_onnx/AP": 0.25}

    monkeypatch.setattr("pipelines.registry.remeasure.onnx_figures", figures)
    assert main(["models", "evaluate", "champion"]) == 0
    assert measured == [((project / "data/report/model.onnx").read_bytes(), "keypoints")]
    printed = capsys.readouterr().out
    assert "version 2 is the new champion: whole/AP 0.5000 against 0.0000 of version 1" in printed
    client = connect(f"sqlite:///{project}/mlflow.db")
    assert champion(client) == 2
    first, second = (Measurement.from_tags(client.get_model_version(MODEL, number).tags) for number in "12")
    assert (first.data, first.protocol) == (second.data, second.protocol)
    assert first.matches and first.metrics["body/AP"] == 0.0  # of weights that were never trained
    assert first.metrics["whole_onnx/AP"] == 0.25
