from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from mlflow import MlflowClient

from cigpose.config import Config, config_from_mapping
from pipelines import register
from pipelines.registry.card import description
from pipelines.registry.gate import Rules, decide
from pipelines.registry.measurement import Measurement, protocol_of
from pipelines.registry.versions import Registry
from pipelines.tracking.address import UnreachableError, connect

MODEL = "cigpose-quickstart"


def evaluation(
    ap: float, data: str = "d1", protocol: str = '{"flip_test": true}', metric: str = "whole/AP"
) -> Measurement:
    return Measurement(metrics={metric: ap, "body/AP": 0.9}, data=data, protocol=protocol)


@pytest.mark.parametrize(
    ("challenger", "champion", "margin", "verdict", "text"),
    [
        (evaluation(0.5), None, 0.0, "first", "version 2 is the first champion, with whole/AP 0.5000."),
        (evaluation(0.6), evaluation(0.5), 0.0, "better", "new champion: whole/AP 0.6000 against 0.5000 of version 1"),
        (evaluation(0.4), evaluation(0.5), 0.0, "not_better", "stays challenger: whole/AP 0.4000 against 0.5000"),
        (evaluation(0.5), evaluation(0.5), 0.0, "not_better", "margin 0."),
        (evaluation(0.505), evaluation(0.5), 0.01, "not_better", "margin 0.01"),
        (evaluation(0.52), evaluation(0.5), 0.01, "better", "margin 0.01"),
        (
            evaluation(0.9, data="d2"),
            evaluation(0.5),
            0.0,
            "not_comparable",
            "evaluated on other people (data d1, here d2)",
        ),
        (
            evaluation(0.9, protocol='{"flip_test": false}'),
            evaluation(0.5),
            0.0,
            "not_comparable",
            "another protocol (flip_test True, here False)",
        ),
        (evaluation(-1.0), None, 0.0, "not_measured", "whole/AP is -1, so nothing it can do was measured"),
        (evaluation(0.0), None, 0.0, "not_measured", "whole/AP is 0,"),
        (evaluation(float("nan")), evaluation(0.5), 0.0, "not_measured", "whole/AP is nan,"),
        (evaluation(float("nan")), None, 0.0, "not_measured", "version 2 stays challenger"),
        (evaluation(0.0), evaluation(-1.0), 0.0, "not_measured", "stays challenger"),
        (evaluation(0.1), evaluation(float("nan")), 0.0, "better", "new champion"),
        (evaluation(0.9), evaluation(0.5, metric="foot/AP"), 0.0, "not_comparable", "it has no whole/AP"),
    ],
    ids=[
        "first",
        "better",
        "worse",
        "equal",
        "within margin",
        "beyond margin",
        "other people",
        "other protocol",
        "nothing labelled, first",
        "zero, first",
        "no number",
        "no number, first",
        "zero, against nothing",
        "after one that measured nothing",
        "other metric",
    ],
)
def test_who_becomes_champion(challenger, champion, margin, verdict, text) -> None:
    decision = decide(2, challenger, (1, champion) if champion else None, Rules(metric="whole/AP", margin=margin))
    assert decision.verdict == verdict
    assert text in decision.text
    assert decision.promotes == (verdict in ("first", "better"))


def test_the_champion_is_not_compared_with_itself() -> None:
    decision = decide(3, evaluation(0.5), (3, evaluation(0.5)), Rules(metric="whole/AP"))
    assert decision.verdict == "is_champion"
    assert not decision.promotes


def test_an_evaluation_survives_the_tags_of_a_version() -> None:
    kept = Measurement.from_tags({"git.revision": "abc", **evaluation(0.25).tags()})
    assert kept == evaluation(0.25)


def test_a_version_says_where_the_sigmas_of_its_ap_come_from() -> None:
    kept = Measurement.from_tags(replace(evaluation(0.25), sigmas="estimated from a study").tags())
    assert "AP with sigmas estimated from a study." in description(kept, None)
    assert "sigmas" not in description(evaluation(0.25), None)  # of before that was kept


@pytest.mark.parametrize(
    ("name", "one", "other", "is_same"),
    [
        ("batch", 7, 8, True),
        ("metric", "body/AP", "whole/AP", True),
        ("flip_test", True, False, False),
        ("sigmas", None, {"origin": "a study", "values": {"nose": 0.026}}, True),  # as it was
        ("sigmas", None, {"origin": "a study", "values": {"nose": 0.027}}, False),
    ],
)
def test_the_protocol_holds_what_changes_figures(
    config: Config, name: str, one: object, other: object, is_same: bool
) -> None:
    values = config.to_mapping()
    protocols = [
        protocol_of(config_from_mapping(values | {"evaluate": values["evaluate"] | {name: value}}))
        for value in (one, other)
    ]
    assert (protocols[0] == protocols[1]) is is_same


@pytest.fixture
def client(project: Path) -> MlflowClient:
    return connect(f"sqlite:///{project}/mlflow.db")


def aliases(client: MlflowClient) -> dict[str, int]:
    return {name: int(version) for name, version in client.get_registered_model(MODEL).aliases.items()}


@pytest.mark.slow
def test_a_sequence_of_models(project: Path, trained, config: Config, client: MlflowClient) -> None:
    """First, better, worse, the first again, and one evaluated on other people."""
    trained(config, seed=1, whole_ap=0.5)
    first = register.register(config, project)
    assert (first["version"], first["alias"], first["decision"]) == (1, "champion", "first")
    assert aliases(client) == {"champion": 1}

    trained(config, seed=2, whole_ap=0.6)
    better = register.register(config, project)
    assert (better["version"], better["alias"], better["decision"]) == (2, "champion", "better")
    assert better["champion"] == {"version": 1, "value": 0.5}
    assert aliases(client) == {"champion": 2}

    trained(config, seed=3, whole_ap=0.55)
    worse = register.register(config, project)
    assert (worse["version"], worse["alias"], worse["decision"]) == (3, "challenger", "not_better")
    tags = client.get_model_version(MODEL, "3").tags
    numbers = json.loads(tags["values.decision"])
    assert (tags["decision"], numbers["value"], numbers["champion_value"]) == ("not_better", 0.55, 0.6)
    assert aliases(client) == {"champion": 2, "challenger": 3}

    again = register.register(config, project)
    assert again == worse
    assert len(client.search_model_versions(f"name = '{MODEL}'")) == 3

    trained(config, seed=4, whole_ap=0.9, images=200)
    other = register.register(config, project)
    assert (other["alias"], other["decision"]) == ("challenger", "not_comparable")
    assert "other people" in other["decision_text"]
    assert aliases(client) == {"champion": 2, "challenger": 4}


@pytest.mark.slow
def test_a_registered_model_is_complete(
    project: Path, trained, config: Config, client: MlflowClient, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DVC_EXP_NAME", "retrain-20260302-030000")  # as in every stage of an experiment
    (project / "dvc.lock").write_text(
        "stages:\n  shard@rendered-val:\n    outs:\n    - path: data/shards/rendered-val\n      md5: 77.dir\n"
    )
    run_id = trained(config, seed=1, whole_ap=0.61)
    facts = project / "data/model/run.json"
    start = {"from": "models:/first/3", "sha256": "ab12", "summary": "177 taken, 3 mapped of 180 tensors; 12 of 14"}
    facts.write_text(json.dumps(json.loads(facts.read_text()) | {"start_from": start}))
    assert register.main([]) == 0
    printed = capsys.readouterr().out
    assert "version 1, alias champion: models:/cigpose-quickstart@champion" in printed
    assert "whole" in printed and "0.610" in printed and "data/report/pictures" in printed and "make ui" in printed

    version = client.get_model_version_by_alias(MODEL, "champion")
    assert version.run_id == run_id
    assert Measurement.from_tags(version.tags).metrics["whole/AP"] == 0.61
    assert len(version.tags) <= 10
    assert version.tags["keypoints"] == "coco_wholebody"
    assert version.tags["dvc.experiment"] == "retrain-20260302-030000"
    assert {"git.revision", "dvc.lock", "preset", "decision", "decision.text"} <= version.tags.keys()
    description = version.description or ""
    assert "| whole | 0.610 |" in description and "version 1 is the first champion" in description

    folder = Path(
        client.get_logged_model(version.source.removeprefix("models:/")).artifact_location.removeprefix("file://")
    )
    for name in ("model.safetensors", "model.onnx", "params.yaml", "keypoints.json", "metrics.json", "dvc.lock"):
        assert (folder / "artifacts" / name).stat().st_size > 0, name
    card = (folder / "README.md").read_text()
    assert "| whole | 0.610 |" in card and "version 1 is the first champion" in card
    assert "Started from `models:/first/3` (sha256 `ab12`): 177 taken, 3 mapped of 180 tensors; 12 of 14." in card
    assert "- rendered-train: rendered by this project" in card and "## Intended use" in card
    assert (folder / "input_example.json").is_file()
    assert (folder / "artifacts/pictures/page-00.jpg").is_file()
    assert (folder / "artifacts/report.html").read_bytes() == (project / "data/report/report.html").read_bytes()
    assert (folder / "code/cigpose/config/experiment.py").is_file()
    assert len(json.loads((folder / "artifacts/keypoints.json").read_text())["names"]) == 133
    lineage = json.loads((folder / "artifacts/lineage.json").read_text())
    assert lineage["datasets"]["rendered-val"]["dvc_md5"] == "77.dir"
    assert any(line.startswith("torch==2.") for line in (folder / "requirements.txt").read_text().splitlines())

    run = client.get_run(run_id)
    assert run.data.metrics["version/whole_AP"] == 0.61
    assert [output.model_id for output in run.outputs.model_outputs] == [version.source.removeprefix("models:/")]
    assert run.info.status == "FINISHED"
    assert [file.path for file in client.list_artifacts(run_id, "evaluation/pictures")] == [
        "evaluation/pictures/page-00.jpg"
    ]
    assert "evaluation/report.html" in {file.path for file in client.list_artifacts(run_id, "evaluation")}
    assert register.main(["--show"]) == 0
    assert capsys.readouterr().out == printed


@pytest.mark.slow
def test_the_same_weights_evaluated_in_another_way_keep_their_version(
    project: Path, trained, measure, config: Config, client: MlflowClient
) -> None:
    """So a champion is made comparable again: evaluate it as its challengers are, and register it once more."""
    trained(config, seed=1, whole_ap=0.5)
    register.register(config, project)
    measure(project, config, {"whole": {"AP": 0.45}})
    registered = register.register(config, project)
    assert (registered["version"], registered["decision"]) == (1, "is_champion")
    assert Measurement.from_tags(client.get_model_version(MODEL, "1").tags).metrics["whole/AP"] == 0.45


def test_nothing_is_registered_without_the_metric_to_compare_by(
    project: Path, trained, measure, config: Config, capsys
) -> None:
    trained(config, seed=1, whole_ap=0.5)
    measure(project, config, {"body": {"AP": 0.45}})
    assert register.main([]) == 1
    assert "data/report/measurement.json: no whole/AP (evaluate.metric)" in capsys.readouterr().err


@pytest.mark.slow
def test_a_server_that_is_away_is_one_sentence_and_a_rerun_registers_once(
    project: Path, trained, make_config, mlflow_server
) -> None:
    mlflow_server.kill()
    config = make_config(**mlflow_server.own(project))
    run_id = trained(config, seed=1, whole_ap=0.5)
    assert run_id.startswith("local-")
    command = [sys.executable, "-m", "pipelines.register"]  # a fresh process, without what earlier tests have set
    started = time.monotonic()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_HTTP")}
    away = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True)
    assert time.monotonic() - started < 30  # of which most is the start of Python and MLflow
    assert away.returncode == 1
    assert re.fullmatch(
        r"register: MLflow at http\S+ does not answer \(ConnectionError\)\. Nothing is lost: .*\n", away.stderr
    )
    with socket.socket() as silent:  # takes the connection, and says nothing
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        started = time.monotonic()
        with pytest.raises(UnreachableError, match="does not answer"):
            connect(f"http://127.0.0.1:{silent.getsockname()[1]}")
        assert time.monotonic() - started < 10
    mlflow_server.start()
    for _ in range(2):
        registered = register.register(config, project)
        assert MlflowClient(mlflow_server.address).get_run(registered["run_id"]).data.tags["cigpose.local_id"] == run_id
    assert len(MlflowClient(mlflow_server.address).search_model_versions(f"name = '{config.registry.model}'")) == 1


def test_a_run_that_mlflow_does_not_have_is_named(project: Path, trained, config: Config, capsys) -> None:
    trained(config, seed=1, whole_ap=0.5)
    (project / "data/model/run.json").write_text(json.dumps({"run_id": "0" * 32}))
    shutil.rmtree(project / "data/model/record")
    assert register.main([]) == 1
    error = capsys.readouterr().err
    assert f"has no run {'0' * 32}" in error
    assert "mlflow.db" in error


@pytest.mark.parametrize(
    "missing",
    [
        "data/model/run.json",
        "data/report/measurement.json",
        "data/report/model.onnx",
    ],
)
def test_a_missing_input_is_named(project: Path, trained, config: Config, capsys, missing: str) -> None:
    trained(config, seed=1, whole_ap=0.5)
    (project / missing).unlink()
    assert register.main([]) == 1
    assert f"{missing}: not found" in capsys.readouterr().err


def test_no_champion_alias_means_no_champion(project: Path, client: MlflowClient) -> None:
    registry = Registry(client, "nobody")
    registry.ensure("")
    assert registry.by_alias("champion") is None
    assert registry.find("a", "b") is None


@pytest.mark.slow
def test_a_registry_elsewhere_is_used_alone(project: Path, trained, make_config, client: MlflowClient) -> None:
    (project / "mlflow.db").rename(project / "elsewhere.db")
    config = make_config(tracking_uri=f"sqlite:///{project}/elsewhere.db")
    trained(config, seed=1, whole_ap=0.5)
    assert register.register(config, project)["version"] == 1
    assert not (project / "mlflow.db").exists()
