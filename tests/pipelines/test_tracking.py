from __future__ import annotations

import json
import multiprocessing
import resource
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow import MlflowClient

from cigpose.config import Config
from pipelines import lineage
from pipelines.tracking import delivery
from pipelines.tracking import run as tracking
from pipelines.tracking.spool import Spool


def history(client: MlflowClient, run_id: str, name: str) -> list[tuple[int, float]]:
    return sorted((metric.step, metric.value) for metric in client.get_metric_history(run_id, name))


@pytest.fixture
def address(project: Path) -> str:
    return f"sqlite:///{project}/mlflow.db"


def test_a_run_has_parameters_tags_metrics_and_files(project: Path, config: Config, address: str) -> None:
    with tracking.start_run(config, kind="train", run_folder=project / ".runs/a") as run:
        for step in (20, 40):
            run.log_metrics({"train/loss": 1 / step, "train/nan": float("nan")}, step)
        (project / "note.txt").write_text("first")
        run.log_artifact("note.txt", "notes")
        (project / "note.txt").write_text("changed after it was logged")
    client = tracking.connect(address)
    found = client.get_run(run.run_id)
    assert found.info.status == "FINISHED"
    assert found.data.params["train.optimizer.learning_rate"] == "0.0012"
    assert found.data.params["data.train"] == '["rendered-train"]'
    assert found.data.tags["cigpose.preset"] == "quickstart"
    assert found.data.tags["cigpose.kind"] == "train"
    assert history(client, run.run_id, "train/loss") == [(20, 0.05), (40, 0.025)]
    note = client.download_artifacts(run.run_id, "notes/note.txt", str(project))
    assert Path(note).read_text() == "first"
    assert (project / "mlartifacts").is_dir()
    assert not (project / ".runs/a/outbox").exists()
    assert run.url is not None and f"/runs/{run.run_id}?" in run.url


def test_a_resumed_run_goes_on_without_repeating_steps(project: Path, config: Config, address: str) -> None:
    first = tracking.start_run(config, run_folder=project / ".runs/a")
    for step in range(10):
        first.log_metrics({"loss": float(step)}, step)
    first.finish("KILLED")
    again = tracking.start_run(config, run_folder=project / ".runs/a")
    for step in range(5, 15):
        again.log_metrics({"loss": float(step)}, step)
    again.finish()
    client = tracking.connect(address)
    assert again.run_id == first.run_id
    assert history(client, again.run_id, "loss") == [(step, float(step)) for step in range(15)]
    assert client.get_run(again.run_id).info.status == "FINISHED"


def test_a_run_goes_on_in_the_mlflow_run_that_is_asked_for(project: Path, config: Config) -> None:
    first = tracking.start_run(config, run_folder=project / ".runs/a")
    first.finish()
    other = tracking.start_run(config, run_folder=project / ".runs/b", run_id=first.run_id)
    other.finish()
    assert other.run_id == first.run_id


def test_history_is_sent_again_when_the_run_was_deleted(project: Path, config: Config, address: str) -> None:
    first = tracking.start_run(config, run_folder=project / ".runs/a")
    first.log_metrics({"loss": 1.0}, 1)
    first.finish()
    client = tracking.connect(address)
    client.delete_run(first.run_id)
    again = tracking.start_run(config, run_folder=project / ".runs/a")
    again.log_metrics({"loss": 2.0}, 2)
    again.finish()
    assert again.run_id != first.run_id
    assert history(client, again.run_id, "loss") == [(1, 1.0), (2, 2.0)]
    assert client.get_run(again.run_id).data.params["seed"] == "0"


def test_a_finished_run_whose_database_was_lost_is_found_by_its_old_id(
    project: Path, config: Config, address: str, empty_database: Path
) -> None:
    with tracking.start_run(config, run_folder=project / ".runs/a") as run:
        run.log_metrics({"loss": 1.0}, 1)
    shutil.copyfile(empty_database, project / "new.db")
    new = f"sqlite:///{project}/new.db"
    client = tracking.connect(new)
    first = tracking.resolve_run_id(client, config, run.run_id, project / ".runs", new)
    assert first not in (None, run.run_id)
    assert history(client, first, "loss") == [(1, 1.0)]
    assert client.get_run(first).info.status == "FINISHED"
    assert tracking.resolve_run_id(client, config, run.run_id, project / ".runs", new) == first
    assert tracking.resolve_run_id(client, config, "0" * 32, project / ".runs", new) is None


def test_history_is_sent_again_to_another_address(
    project: Path, config: Config, make_config: Callable[..., Config], empty_database: Path
) -> None:
    first = tracking.start_run(config, run_folder=project / ".runs/a")
    first.log_metrics({"loss": 1.0}, 1)
    first.finish()
    shutil.copyfile(empty_database, project / "other.db")
    again = tracking.start_run(make_config(tracking_uri="sqlite:///other.db"), run_folder=project / ".runs/a")
    again.finish()
    assert history(tracking.connect(f"sqlite:///{project}/other.db"), again.run_id, "loss") == [(1, 1.0)]


def test_a_line_cut_short_by_a_kill_is_left_out(project: Path, config: Config, address: str) -> None:
    first = tracking.start_run(config, run_folder=project / ".runs/a")
    first.log_metrics({"loss": 1.0}, 1)
    first.finish()
    with (project / ".runs/a/tracking.jsonl").open("a") as file:
        file.write('{"do": "metrics", "step": 2, "val')
    again = tracking.start_run(config, run_folder=project / ".runs/a")
    again.log_metrics({"loss": 2.0}, 2)
    again.finish()
    assert history(tracking.connect(address), again.run_id, "loss") == [(1, 1.0), (2, 2.0)]


@pytest.mark.parametrize("glued", [True, False], ids=["more behind it", "the last line"])
def test_a_half_line_of_a_full_disk_is_left_out(
    project: Path, config: Config, address: str, caplog: pytest.LogCaptureFixture, glued: bool
) -> None:
    first = tracking.start_run(config, run_folder=project / ".runs/a")
    first.log_metrics({"loss": 1.0}, 1)
    first.finish()
    record = '{"do": "metrics", "step": 2, "values": {"loss": 2.0}, "time": 1}'
    with (project / ".runs/a/tracking.jsonl").open("a") as file:
        file.write(record[:30] + record + "\n" + (record + "\n" if glued else ""))
    again = tracking.start_run(config, run_folder=project / ".runs/a")
    again.log_metrics({"loss": 3.0}, 3)
    again.finish()
    expected = [(1, 1.0), (2, 2.0), (3, 3.0)] if glued else [(1, 1.0), (3, 3.0)]
    assert history(tracking.connect(address), again.run_id, "loss") == expected
    assert caplog.text.count("is broken, expected a JSON object") == glued


def test_a_record_that_does_not_fit_on_the_disk_leaves_no_half_line(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool = Spool(project / ".runs/a")
    spool.acquire()
    spool.append({"do": "tags", "values": {}})
    before = spool.records_path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 20, limits[1]))  # the kernel writes 20 bytes more
        with pytest.raises(OSError):
            spool.append({"do": "tags", "values": {"a": "x" * 100}})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert spool.records_path.read_bytes() == before
    spool.append({"do": "tags", "values": {"b": "y"}})
    assert [record["values"] for _, record in spool.records()] == [{}, {"b": "y"}]


@pytest.mark.parametrize("content", ["", "[]", '{"local_id"'])
def test_a_spoilt_state_of_another_run_stops_nobody(
    project: Path, config: Config, address: str, caplog: pytest.LogCaptureFixture, content: str
) -> None:
    with tracking.start_run(config, run_folder=project / ".runs/a") as run:
        run.log_metrics({"loss": 1.0}, 1)
    spoilt = tracking.start_run(config, run_folder=project / ".runs/b")
    spoilt.finish()
    (project / ".runs/b/tracking.json").write_text(content)
    client = tracking.connect(address)
    assert tracking.resolve_run_id(client, config, run.run_id, project / ".runs", address) == run.run_id
    assert ".runs/b/tracking.json: not readable" in caplog.text
    again = tracking.start_run(config, run_folder=project / ".runs/b")
    again.finish()
    assert client.get_run(again.run_id).info.status == "FINISHED"


@pytest.mark.parametrize("copy", [".", ".dvc/tmp/exps/retrain"], ids=["the project", "a copy of it"])
def test_shards_are_logged_with_digest_and_the_hash_that_dvc_knows_where_the_stage_runs(
    project: Path, config: Config, address: str, copy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (project / "dvc.lock").write_text("stages: {s: {outs: [{path: data/shards/coco-val, md5: 9f9f9f.dir}]}}")
    folder = project / copy / "data/shards/coco-val"
    folder.mkdir(parents=True)
    index = {"dataset": "coco-val", "images": 3, "persons": 5, "sources": {"a": "00"}, "shards": [{"sha256": "ff"}]}
    (folder / "index.json").write_text(json.dumps(index))
    lock = "schema: '2.0'\nstages:\n  s:\n    outs:\n    - path: data/shards/coco-val\n      md5: 123abc.dir\n"
    (project / copy / "dvc.lock").write_text(lock)
    monkeypatch.chdir(project / copy)
    with tracking.start_run(config, run_folder=project / ".runs/a") as run:
        run.log_inputs([folder], context="validation")
    found = tracking.connect(address).get_run(run.run_id).inputs.dataset_inputs[0]
    assert (found.dataset.name, found.dataset.digest) == ("coco-val", lineage.shards_digest(index))
    tags = {tag.key: tag.value for tag in found.tags}
    assert tags["mlflow.data.context"] == "validation"
    assert tags["dvc_md5"] == "123abc.dir"


def test_system_metrics_are_recorded(project: Path, config: Config, address: str) -> None:
    with tracking.start_run(config, run_folder=project / ".runs/a") as run:
        run.sample_system(every_s=0.05)
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline and not Spool(project / ".runs/a").last_steps().get(
            "system/process_memory_megabytes"
        ):
            time.sleep(0.05)
    metrics = tracking.connect(address).get_run(run.run_id).data.metrics
    assert metrics["system/process_memory_megabytes"] > 50
    assert {"system/cpu_utilization_percentage", "system/system_memory_usage_megabytes"} <= metrics.keys()


def _track(folder: Path, config: Config, name: str) -> None:
    run = tracking.start_run(config, run_folder=folder / ".runs" / name)
    run.log_metrics({"loss": 1.0}, 1)
    run.finish()


@pytest.mark.slow
def test_processes_that_make_the_database_at_once_do_not_break_it(project: Path, config: Config, address: str) -> None:
    (project / "mlflow.db").unlink()
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=_track, args=(project, config, f"run-{i}")) for i in range(3)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0, 0, 0]
    client = tracking.connect(address)
    assert len(client.search_runs([delivery.get_experiment(client, "quickstart")])) == 3


@pytest.mark.slow
def test_a_server_killed_and_brought_back_gets_everything_once_and_nobody_waits(
    project: Path, make_config: Callable[..., Config], mlflow_server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delivery, "SILENCE_S", 0.5)
    monkeypatch.setattr(delivery, "GATHER_S", 0.05)
    mlflow_server.start()
    run = tracking.start_run(make_config(tracking_uri=mlflow_server.address), run_folder=project / ".runs/a")
    spool = Spool(project / ".runs/a")

    def log(steps: range) -> float:
        started = time.monotonic()
        for step in steps:
            run.log_metrics({"loss": float(step), "rate": 0.1}, step)
        return time.monotonic() - started

    log(range(100))
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and spool.pending():
        time.sleep(0.05)
        spool.reload()
    assert spool.pending() == 0
    mlflow_server.kill()
    assert log(range(100, 1300)) < 1.0
    (project / "picture.txt").write_text("of step 1300")
    run.log_artifact(project / "picture.txt", "pictures")
    time.sleep(1.5)  # several attempts fail meanwhile
    spool.reload()
    assert spool.pending() > 0
    mlflow_server.start()
    log(range(1300, 1400))
    run.finish()
    client = MlflowClient(mlflow_server.address)
    assert history(client, run.run_id, "loss") == [(step, float(step)) for step in range(1400)]
    assert [file.path for file in client.list_artifacts(run.run_id, "pictures")] == ["pictures/picture.txt"]
    assert client.get_run(run.run_id).info.status == "FINISHED"


@pytest.mark.slow
def test_a_training_with_its_server_down_throughout_is_delivered_by_a_later_one(
    project: Path, make_config: Callable[..., Config], mlflow_server
) -> None:
    config = make_config(tracking_uri=mlflow_server.address)
    started = time.monotonic()
    run = tracking.start_run(config, run_folder=project / ".runs/a")
    run.log_metrics({"loss": 1.0}, 1)
    run.finish()
    assert time.monotonic() - started < 20
    assert run.run_id.startswith("local-")
    assert run.url is None
    mlflow_server.start()
    other = tracking.start_run(config, run_folder=project / ".runs/b")
    other.finish()
    client = tracking.connect(mlflow_server.address)
    run_id = tracking.resolve_run_id(client, config, run.run_id, project / ".runs", mlflow_server.address)
    assert run_id is not None
    assert history(client, run_id, "loss") == [(1, 1.0)]
    assert client.get_run(run_id).info.status == "FINISHED"


@pytest.mark.parametrize(
    ("in_params", "in_environment", "expected"),
    [
        (None, None, "sqlite:///{root}/mlflow.db"),
        (None, "http://host:1", "http://host:1"),
        ("http://host:2", "http://host:1", "http://host:2"),
        ("sqlite:///mine.db", None, "sqlite:///{root}/mine.db"),
        ("sqlite:////abs/mine.db", None, "sqlite:////abs/mine.db"),
    ],
    ids=["neither", "environment", "params win", "relative file", "absolute file"],
)
def test_the_address_of_mlflow(project, make_config, monkeypatch, in_params, in_environment, expected) -> None:
    if in_environment:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", in_environment)
    address = tracking.tracking_address(make_config(tracking_uri=in_params), project)
    assert address == expected.format(root=project)


def test_an_experiment_in_a_temporary_copy_uses_the_database_of_the_project(project: Path) -> None:
    copy = project / ".dvc/tmp/exps/standalone/tmp123"
    copy.mkdir(parents=True)
    assert lineage.project_root(copy) == project
    assert lineage.project_root(project) == project


def test_the_content_of_shards_does_not_depend_on_how_they_are_cut() -> None:
    index = {"dataset": "a", "images": 4, "sources": {"a.zip": "11"}, "shards": [{"sha256": "1"}]}
    cut = index | {"shards": [{"sha256": "2"}, {"sha256": "3"}]}
    assert lineage.content_digest(index) == lineage.content_digest(cut)
    assert lineage.content_digest(index) != lineage.content_digest(index | {"images": 5})
    assert lineage.shards_digest(index) != lineage.shards_digest(cut)
