"""The stage `train` as a command: results, resuming, kills at every level, bad luck in one sentence."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from train_stage import Stage

from cigpose.config import load_params
from cigpose.model.estimator import build_model
from cigpose.model.weights import save_weights
from pipelines import download
from pipelines.tracking.address import connect
from pipelines.tracking.run import Run
from pipelines.tracking.sync import sync_run
from pipelines.training import start

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

LONG: dict[str, Any] = {"train__epochs": 8, "train__checkpoint": {"every_steps": 2, "every_minutes": None, "keep": 2}}


def workers_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The Ray workers that train."""
    children = psutil.Process(process.pid).children(recursive=True)
    return [child for child in children if "RayTrainWorker" in " ".join(child.cmdline())]


def is_open(port: Any) -> bool:
    """Whether other machines can connect to it."""
    return port.status == psutil.CONN_LISTEN and not port.laddr.ip.startswith("127.")


def test_killed_at_every_level_the_weights_equal_those_of_a_run_never_killed(stage: Stage, s3: Any) -> None:
    stage.params(**LONG)
    code, output = stage.run()
    assert code == 0, output[-3000:]
    expected, history = stage.weights(), (stage.folder / "data/plots/loss.csv").read_text()
    kept = {stage.folder / ".runs": stage.folder / ".kept", stage.folder / "data/model": stage.folder / ".kept-model"}
    for source, target in kept.items():
        source.rename(target)

    process = stage.start()
    stage.wait_for_step(process, 3)
    for worker in workers_of(process):  # Ray starts it again
        worker.kill()
    stage.wait_for_step(process, 7)
    for worker in workers_of(process):  # Ray asks for its token; torch's store, which would ask for nothing, is a file
        assert len({port.laddr.port for port in worker.net_connections("tcp") if is_open(port)}) <= 1
    helpers = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGKILL)  # the driver, and what is in its group
    process.wait()
    _, alive = psutil.wait_procs(helpers, timeout=20)  # the last of Ray's would stay for a minute
    assert not alive

    s3.create_bucket(Bucket="training")
    checkpoints = next(stage.folder.glob(".runs/*/checkpoints"))
    for file in filter(Path.is_file, checkpoints.rglob("*")):
        s3.upload_file(str(file), "training", f"quickstart/{file.relative_to(checkpoints)}")
    away = {**LONG["train__checkpoint"], "address": "s3://training/quickstart"}
    stage.params(**{**LONG, "train__checkpoint": away})
    aws = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    process = stage.start(**aws)  # and now politely
    stage.wait_for_step(process, 9)
    started = workers_of(process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 128 + signal.SIGTERM
    assert "resumed at step" in output
    assert "Traceback" not in output
    _, alive = psutil.wait_procs(started, timeout=60)
    assert not alive

    [run] = [Run(path.parent) for path in stage.folder.glob(".runs/*/run.json")]
    client = connect(f"sqlite:///{stage.folder}/mlflow.db")
    sync_run(run.folder, client)
    steps = [metric.step for metric in client.get_metric_history(run.run_id, "train/loss")]
    assert sorted(steps) == list(range(1, max(steps) + 1)) and max(steps) >= 9  # one run in MLflow, each step once

    shutil.rmtree(stage.folder / ".runs")  # as on another machine, which has nothing but the address
    code, output = stage.run(**aws)
    assert code == 0 and "resumed at step" in output, output[-3000:]
    weights = stage.weights()
    assert all(torch.equal(weights[key], expected[key]) for key in expected)
    assert (stage.folder / "data/plots/loss.csv").read_text() == history
    for source, target in kept.items():
        shutil.rmtree(source)
        target.rename(source)


def test_a_finished_run_is_copied_out_again_and_other_params_are_another_run(stage: Stage) -> None:
    stage.params(**LONG)
    before = (stage.folder / "data/model/model.safetensors").read_bytes()
    shutil.rmtree(stage.folder / "data/model")
    code, output = stage.run()
    assert code == 0 and "finished before" in output
    assert (stage.folder / "data/model/model.safetensors").read_bytes() == before
    run = json.loads((stage.folder / "data/model/run.json").read_text())
    assert run["datasets"].keys() == {"rendered-train", "rendered-val"}
    record = Run(stage.folder / "data/model/record")
    names = {"params.yaml", "curves.svg", "history.jsonl"}
    assert names <= {path.name for path in record.folder.iterdir()} and list(record.folder.glob("pictures/*.jpg"))
    assert (record.facts["status"], record.facts["address"]) == ("FINISHED", None)
    assert run["epochs"] == 8 and 1 <= run["best_epoch"] <= 8 and run["run_id"]
    stage.params(**LONG, train__optimizer={"learning_rate": 1e30, "learning_rate_batch": 8, "clip_grad_norm": None})
    code, output = stage.run()  # a rate at which nothing can stay a number
    assert code == 1
    assert "train: " in output and ("the optimiser was not moved" in output or "no checkpoint was written" in output)
    assert "rendered-train/" in output or "no checkpoint" in output
    assert len(list((stage.folder / ".runs").glob("*/"))) == 2


@pytest.mark.parametrize(
    "changes, environment, message",
    [
        ({"train__cluster": {"num_workers": 1, "use_gpu": True}}, {"CUDA_VISIBLE_DEVICES": ""}, "a GPU each"),
        ({"evaluate__metric": "whole/PCK", "train__epochs": 1}, {}, "evaluate.metric: 'whole/PCK' is not among"),
        ({}, {"RAY_ADDRESS": "127.0.0.1:1"}, "no Ray cluster answers at RAY_ADDRESS=127.0.0.1:1"),
    ],
    ids=["no GPU", "no such metric", "no such cluster"],
)
def test_bad_luck_is_one_sentence(stage: Stage, changes: dict, environment: dict, message: str) -> None:
    stage.params(**changes)
    code, output = stage.run(**environment)
    assert code == 1
    assert message in output
    assert "Traceback" not in output


def test_changed_shards_are_named_before_anything_starts(stage: Stage) -> None:
    stage.params()
    tar = sorted((stage.folder / "data/shards/rendered-train").glob("*.tar"))[0]
    content = tar.read_bytes()
    try:
        tar.write_bytes(content + b"0" * 512)
        code, output = stage.run()
    finally:
        tar.write_bytes(content)
    assert code == 1
    assert tar.name in output and "index.json says" in output


def test_checkpoints_of_other_params_at_an_address_are_refused_until_restart(stage: Stage, tmp_path: Path) -> None:
    begun = time.time()
    address = {"every_steps": 2, "every_minutes": None, "keep": 1, "address": str(tmp_path / "kept")}
    personal = {"videos.zip": "HANDED-OUT-TO-ME"}
    short = {"train__epochs": 1, "train__checkpoint": address, "data__download__drive_ids": personal}
    stage.params(**short)
    assert stage.run()[0] == 0
    expected = (stage.folder / "data/model/model.safetensors").read_bytes()
    [results] = [done.parent / "results" for done in stage.folder.glob(".runs/*/DONE") if done.stat().st_mtime > begun]
    (results / "model/model.safetensors").write_bytes(b"")  # as a disk does that lost its power
    code, output = stage.run()
    assert code == 0 and "the results are made again from the last checkpoint" in output, output[-2000:]
    assert (stage.folder / "data/model/model.safetensors").read_bytes() == expected
    stage.params(**short, seed=8)
    code, output = stage.run()
    assert code == 1
    assert "seed: 0 there, 8 now" in output and "--restart" in output
    code, output = stage.run("--restart")
    assert code == 0, output[-2000:]
    kept = [path for folder in (stage.folder, tmp_path) for path in folder.rglob("*") if path.is_file()]
    holders = {path.name for path in kept if b"HANDED-OUT-TO-ME" in path.read_bytes()}
    assert holders == {"params.yaml"} and b"HANDED-OUT" not in (stage.folder / "data/model/params.yaml").read_bytes()


def test_the_stage_trains_from_another_model_and_tells_what_it_took(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(stage.folder)
    body = {"evaluate__metric": "body/AP", "train__validation__metric": "body/AP"}
    stage.params(keypoints="crowdpose", model__causal__train_top_k=1, **body)
    source = load_params()
    given = build_model(source).state_dict()
    save_weights(tmp_path / "model.safetensors", given, source)
    stage.params(
        train__start_from=str(tmp_path / "model.safetensors"),
        train__epochs=1,
        train__optimizer__learning_rate_factors={"backbone": 0.0, "head.cls_gx": 0.0},
    )
    assert download.main(["pretrained"]) == 0
    code, output = stage.run()
    assert code == 0, output[-3000:]
    assert f"train: starts from {tmp_path}/model.safetensors:\n  " in output
    assert "12 of 133 keypoints by name from crowdpose (anew: nose, left_eye, right_eye and 118 more)" in output
    weights = stage.weights()
    resting = [name for name in given if name.startswith(("backbone.", "head.cls_gx."))]
    assert all(torch.equal(weights[name], given[name]) for name in resting)
    report = json.loads((stage.folder / "data/model/record" / start.REPORT).read_text())
    assert set(report["mapped"]) == {name for name in weights if weights[name].shape != given[name].shape}
    assert {*report["taken"], *report["mapped"]} == set(weights) and not report["anew"]
    assert report["keypoints"]["matched"] == [
        name for name in load_params().keypoint_set.names if name in source.keypoint_set.names
    ]
    run = json.loads((stage.folder / "data/model/run.json").read_text())
    assert run["start_from"] == {name: report[name] for name in ("from", "sha256", "summary")}
