from __future__ import annotations

import json
import multiprocessing
import os
import resource
import shutil
import signal
import time
from collections.abc import Callable
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest
from mlflow import MlflowClient
from shard_index import shard_index

from cigpose.config import Config, config_from_mapping, load_preset
from cigpose.shard.index import parse_index, read_index
from pipelines import lineage
from pipelines.tracking import courier
from pipelines.tracking.address import connect, run_url, tracking_address
from pipelines.tracking.courier import tracked
from pipelines.tracking.run import Run, append_record, read_records, run_name
from pipelines.tracking.sync import get_experiment, resolve_run_id, sync_run

SAMPLED = "system/process_memory_megabytes"


def loss(step: int) -> dict[str, object]:
    return {"kind": "log", "step": step, "loss": float(step)}


def losses(client: MlflowClient, run_id: str, name: str = "train/loss") -> list[tuple[int, float]]:
    return sorted((metric.step, metric.value) for metric in client.get_metric_history(run_id, name))


def expected(*steps: int) -> list[tuple[int, float]]:
    return [(step, float(step)) for step in steps]


@pytest.fixture
def address(project: Path) -> str:
    return f"sqlite:///{project}/mlflow.db"


@pytest.fixture
def folder(project: Path) -> Path:
    return project / ".runs/a"


def test_a_run_has_parameters_tags_metrics_and_files(folder: Path, config: Config, address: str) -> None:
    with tracked(config, folder) as run:
        for step in (20, 40):
            run.log_record({"kind": "log", "step": step, "epoch": 0, "loss": 1 / step, "nan": float("nan")})
        run.log_record({"kind": "validation", "step": 40, "epoch": 0, "whole/AP": 0.5})
        (folder / "pictures").mkdir()
        (folder / "pictures/page.txt").write_text("drawn")
        run.note_file(folder / "pictures/page.txt", "validation")
    client = connect(address)
    found = client.get_run(run.run_id)
    assert found.info.status == "FINISHED"
    assert found.data.params["train.optimizer.learning_rate"] == "0.0012"
    assert found.data.params["data.train"] == '["rendered-train"]'
    assert found.data.tags["cigpose.preset"] == "quickstart"
    assert found.data.tags["cigpose.kind"] == "train"
    assert losses(client, run.run_id) == [(20, 0.05), (40, 0.025)]
    assert (found.data.metrics["val/whole_AP"], found.data.metrics["val/epoch"]) == (0.5, 0)
    root = Path(found.info.artifact_uri.removeprefix("file://"))
    assert (root / "validation/page.txt").read_text() == "drawn"
    assert "learning_rate: 0.0012" in (root / "params.yaml").read_text()
    assert root.is_relative_to(folder.parents[1] / "mlartifacts")


def test_a_file_is_uploaded_once_and_again_when_it_has_changed(folder: Path, config: Config, address: str) -> None:
    with tracked(config, folder) as run:
        (folder / "crops.txt").write_text("first")
        run.note_file(folder / "crops.txt")
    client = connect(address)
    uploaded = Path(client.get_run(run.run_id).info.artifact_uri.removeprefix("file://")) / "crops.txt"
    assert uploaded.read_text() == "first"
    uploaded.write_text("left alone")
    sync_run(folder, client)
    assert uploaded.read_text() == "left alone"
    (folder / "crops.txt").write_text("of the resumed training")
    sync_run(folder, client)
    assert uploaded.read_text() == "of the resumed training"


def _train_and_be_killed(folder: Path, config: Config, address: str) -> None:
    with tracked(config, folder) as run:
        for step in range(10):
            run.log_record(loss(step))
        while not run.run_id.isalnum() or len(losses(connect(address), run.run_id)) < 10:
            time.sleep(0.02)
        for step in range(10, 13):
            run.log_record(loss(step))  # gathered, perhaps not delivered
        with run.history.open("a") as file:
            file.write('{"kind": "log", "step": 13, "lo')
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_run_goes_on_in_the_same_mlflow_run_without_repeating_steps(
    folder: Path, config: Config, address: str
) -> None:
    child = multiprocessing.get_context("fork").Process(target=_train_and_be_killed, args=(folder, config, address))
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    client = connect(address)
    killed = Run(folder).run_id
    assert client.get_run(killed).info.status == "RUNNING"
    half = [folder / f".{name}.0badcafe.part" for name in ("run.json", "history.jsonl", "sync.json")]
    for path in half:
        path.write_text("{")
    times = {metric.step: metric.timestamp for metric in client.get_metric_history(killed, "train/loss")}
    with tracked(config, folder) as run:
        run.restart_history([loss(step) for step in range(5)])  # the checkpoint's
        for step in range(5, 15):
            run.log_record(loss(step))
    assert run.run_id == killed and not any(path.exists() for path in half)
    assert losses(client, killed) == expected(*range(15))
    assert client.get_run(killed).info.status == "FINISHED"
    again = {metric.step: metric.timestamp for metric in client.get_metric_history(killed, "train/loss")}
    assert times.items() <= again.items()
    assert [record["step"] for record in read_records(run.history)] == list(range(14, -1, -1))


def test_a_restarted_history_keeps_the_times_of_what_it_has(folder: Path, config: Config) -> None:
    run = Run(folder)
    run.begin(config, "train", "sqlite:///none")
    for step in range(3):
        run.log_record(loss(step))
    before = {record["step"]: record["time"] for record in read_records(run.history)}
    time.sleep(0.002)
    run.restart_history([loss(0), loss(1)])
    assert {record["step"]: record["time"] for record in read_records(run.history)} == {0: before[0], 1: before[1]}


def test_a_delivery_cut_off_before_it_was_noted_repeats_nothing(folder: Path, config: Config, address: str) -> None:
    with tracked(config, folder) as run:
        for step in range(5):
            run.log_record(loss(step))
    known = run.run_id
    (folder / "sync.json").unlink()
    run.history.unlink()
    time.sleep(0.002)
    run.restart_history([loss(step) for step in range(6)])  # measured again, at other times
    client = connect(address)
    assert sync_run(folder, client) == known
    assert losses(client, known) == expected(*range(6))
    assert len(client.search_runs([get_experiment(client, "quickstart")])) == 1


def test_history_params_and_files_are_sent_again_when_the_run_was_deleted(
    folder: Path, config: Config, address: str
) -> None:
    with tracked(config, folder) as first:
        first.log_record(loss(1))
    known, client = first.run_id, connect(address)
    client.delete_run(known)
    with tracked(config, folder) as again:
        again.log_record(loss(2))
    assert again.run_id != known
    assert losses(client, again.run_id) == expected(1, 2)
    assert client.get_run(again.run_id).data.params["seed"] == "0"
    assert [file.path for file in client.list_artifacts(again.run_id)] == ["params.yaml"]


def test_a_finished_run_whose_database_was_lost_is_found_by_its_old_id(
    project: Path, folder: Path, config: Config, empty_database: Path
) -> None:
    with tracked(config, folder) as run:
        run.log_record(loss(1))
    known = run.run_id
    shutil.copyfile(empty_database, project / "mlflow.db")
    client = connect(f"sqlite:///{project}/mlflow.db")
    first = resolve_run_id(client, config, known, project / ".runs")
    assert first not in (None, known)
    assert losses(client, first) == expected(1)
    assert client.get_run(first).info.status == "FINISHED"
    assert resolve_run_id(client, config, known, project / ".runs") == first
    assert resolve_run_id(client, config, "0" * 32, project / ".runs") is None


def test_history_is_sent_again_to_another_address_and_a_way_back_repeats_nothing(
    project: Path, folder: Path, config: Config, address: str, empty_database: Path
) -> None:
    with tracked(config, folder) as run:
        run.log_record(loss(1))
    known = run.run_id
    shutil.copyfile(empty_database, project / "other.db")
    other = connect(f"sqlite:///{project}/other.db")
    assert losses(other, sync_run(folder, other)) == expected(1)
    assert sync_run(folder, connect(address)) == known
    assert losses(connect(address), known) == expected(1)


@pytest.mark.parametrize("rest", ["\n", "", '{"kind": "log", "step": 2, "loss": 2.0, "time": 1}\n'])
def test_a_half_line_is_left_out_and_said_once(
    folder: Path, config: Config, address: str, caplog: pytest.LogCaptureFixture, rest: str
) -> None:
    with tracked(config, folder) as run:
        run.log_record(loss(1))
        with run.history.open("a") as file:
            file.write(f'{{"kind": "log", "{folder.name}' + rest)
        run.log_record(loss(3))
        run.log_record(loss(4))
    client = connect(address)
    assert losses(client, run.run_id) == expected(1, 3, 4)
    assert caplog.text.count("is no record, and is left out") == 1


def test_a_record_that_does_not_fit_on_the_disk_spoils_no_other(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    append_record(path, loss(1))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 20, limits[1]))  # 20 bytes more are written
        with pytest.raises(OSError):
            append_record(path, loss(2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    append_record(path, loss(3))
    assert [record["step"] for record in read_records(path)] == [3, 1]


@pytest.mark.slow
@pytest.mark.parametrize("content", ["", "[]", '{"id"'])
def test_a_spoilt_note_of_another_run_stops_nobody(
    project: Path, folder: Path, config: Config, address: str, caplog: pytest.LogCaptureFixture, content: str
) -> None:
    with tracked(config, project / ".runs/b") as spoilt:
        spoilt.log_record(loss(1))
    known = spoilt.run_id
    (project / ".runs/b/run.json").write_text(content)
    with tracked(config, folder) as run:
        pass
    client = connect(address)
    assert resolve_run_id(client, config, run.run_id, project / ".runs") == run.run_id
    assert ".runs/b/run.json: not readable" in caplog.text
    (folder / "sync.json").write_text(content)
    assert sync_run(folder, client) == run.run_id
    with tracked(config, project / ".runs/b") as again:
        pass
    assert again.run_id == known


def test_what_mlflow_refuses_is_said_once_and_the_rest_arrives(
    folder: Path, config: Config, address: str, caplog: pytest.LogCaptureFixture
) -> None:
    client, run = connect(address), Run(folder)
    run.begin(config, "train", address)
    run.log_record(loss(1) | {"a%b": 0.5})
    run_id = sync_run(folder, client)
    run.log_record(loss(2))
    sync_run(folder, client)
    assert losses(client, run_id) == expected(2)
    assert caplog.text.count("MLflow refused train/loss, train/a%b of ") == 1


@pytest.mark.parametrize("copy", [".", ".dvc/tmp/exps/retrain"], ids=["the project", "a copy of it"])
def test_shards_are_logged_with_digest_and_the_hash_that_dvc_knows_where_the_stage_runs(
    project: Path, folder: Path, config: Config, address: str, copy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (project / "dvc.lock").write_text("stages: {s: {outs: [{path: data/shards/coco-val, md5: 9f9f9f.dir}]}}")
    shards = project / copy / "data/shards/coco-val"
    shards.mkdir(parents=True)
    (shards / "index.json").write_text(json.dumps(shard_index("coco-val", 3)))
    lock = "schema: '2.0'\nstages:\n  s:\n    outs:\n    - path: data/shards/coco-val\n      md5: 123abc.dir\n"
    (project / copy / "dvc.lock").write_text(lock)
    monkeypatch.chdir(project / copy)
    for _ in range(2):  # a resumed run tells them again
        with tracked(config, folder) as run:
            run.note_inputs([shards], context="validation")
    [found] = connect(address).get_run(run.run_id).inputs.dataset_inputs
    assert (found.dataset.name, found.dataset.digest) == ("coco-val", lineage.shards_digest(read_index(shards)))
    tags = {tag.key: tag.value for tag in found.tags}
    assert tags["mlflow.data.context"] == "validation"
    assert tags["dvc_md5"] == "123abc.dir"


def test_system_metrics_are_recorded_and_counted_on(
    folder: Path, config: Config, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "true")
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.05")
    for _ in range(2):
        with tracked(config, folder) as run:
            before, deadline = len(list(read_records(run.system))), time.monotonic() + 10
            while time.monotonic() < deadline and len(list(read_records(run.system))) < before + 2:
                time.sleep(0.02)
    client = connect(address)
    metrics = client.get_run(run.run_id).data.metrics
    assert metrics[SAMPLED] > 50
    assert {"system/cpu_utilization_percentage", "system/system_memory_usage_megabytes"} <= metrics.keys()
    steps = [step for step, _ in losses(client, run.run_id, SAMPLED)]
    assert len(steps) >= 4 and steps == list(range(len(steps)))


def _track(folder: Path, config: Config, name: str) -> None:
    with tracked(config, folder / ".runs" / name) as run:
        run.log_record(loss(1))


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
    client = connect(address)
    assert len(client.search_runs([get_experiment(client, "quickstart")])) == 3


def _deliver(folder: Path, address: str, barrier: Barrier) -> None:
    client = connect(address)
    barrier.wait(30)
    sync_run(folder, client)


def test_several_that_deliver_a_run_at_once_make_one(folder: Path, config: Config, address: str) -> None:
    run = Run(folder)
    run.begin(config, "train", address)
    for step in range(300):
        run.log_record(loss(step))
    connect(address).create_experiment("quickstart")
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(3)
    children = [context.Process(target=_deliver, args=(folder, address, barrier)) for _ in range(3)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0, 0, 0]
    client = connect(address)
    [found] = client.search_runs([get_experiment(client, "quickstart")])
    assert losses(client, found.info.run_id) == expected(*range(300))


@pytest.mark.slow
def test_a_server_away_holds_nobody_up_and_gets_everything_once_when_it_is_there(
    project: Path, make_config: Callable[..., Config], mlflow_server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Away throughout a first training; there for a second, which delivers both; killed and brought back meanwhile."""
    monkeypatch.setattr(courier, "SILENCE_S", 0.5)
    monkeypatch.setattr(courier, "GATHER_S", 0.05)
    config = make_config(**mlflow_server.own(project))
    mlflow_server.kill()
    started = time.monotonic()
    with tracked(config, project / ".runs/a") as away:
        away.log_record(loss(1))
        assert time.monotonic() - started < 5
    assert time.monotonic() - started < 20
    assert away.run_id.startswith("local-")
    mlflow_server.start()
    client = connect(mlflow_server.address)

    def wait_for(is_there: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 20
        while not is_there():
            assert time.monotonic() < deadline
            time.sleep(0.05)

    with tracked(config, project / ".runs/b") as run:
        for step in range(100):
            run.log_record(loss(step))
        wait_for(lambda: away.run_id.isalnum() and client.get_run(away.run_id).info.status == "FINISHED")
        wait_for(lambda: client.get_run(run.run_id).data.metrics.get("train/loss") == 99)
        mlflow_server.kill()
        started = time.monotonic()
        for step in range(100, 1300):
            run.log_record(loss(step))
        assert time.monotonic() - started < 1
        (run.folder / "picture.txt").write_text("of step 1300")
        run.note_file(run.folder / "picture.txt", "pictures")
        time.sleep(1)  # attempts fail meanwhile
        mlflow_server.start()
        for step in range(1300, 1400):
            run.log_record(loss(step))
    assert losses(client, run.run_id) == expected(*range(1400))
    assert [file.path for file in client.list_artifacts(run.run_id, "pictures")] == ["pictures/picture.txt"]
    assert client.get_run(run.run_id).info.status == "FINISHED"
    local, known = away.facts["id"], away.run_id
    assert resolve_run_id(client, config, local, project / ".runs") == known
    assert losses(client, known) == expected(1)
    shutil.rmtree(away.folder)
    assert resolve_run_id(client, config, local, project / ".runs") == known


def test_a_run_is_named_by_its_preset_and_what_differs_from_it() -> None:
    values = load_preset("quickstart").to_mapping()
    values["registry"]["experiment"] = "mine"
    assert run_name(config_from_mapping(values)) == "quickstart"
    values["seed"], values["train"]["optimizer"]["learning_rate"] = 7, 0.5
    assert run_name(config_from_mapping(values)) == "quickstart, seed 7, learning_rate 0.5"
    values["name"] = "mine"
    assert run_name(config_from_mapping(values)) == "mine"


def test_a_runs_name_says_whose_number_it_is_where_several_have_one_of_that_name() -> None:
    values = load_preset("quickstart").to_mapping()
    values["data"]["render"]["rendered-train"]["num_images"] = 800
    values["data"]["render"]["rendered-val"]["num_images"] = 60
    values["robustness"]["enabled"] = True  # train.ema.enabled is another
    named = "quickstart, rendered-train.num_images 800, rendered-val.num_images 60, robustness.enabled true"
    assert run_name(config_from_mapping(values)) == named


@pytest.mark.parametrize(
    ("address", "page"),
    [("sqlite:////a/mlflow.db", "http://127.0.0.1:5001/#/"), ("http://me:pass@host:1/sub/", "http://host:1/sub/#/")],
    ids=["make ui", "server"],
)
def test_the_page_of_a_run(monkeypatch: pytest.MonkeyPatch, address: str, page: str) -> None:
    monkeypatch.setenv("MLFLOW_PORT", "5001")
    assert run_url(address, "3", "abc") == f"{page}experiments/3/runs/abc?workflowType=machine_learning"


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
    address = tracking_address(make_config(tracking_uri=in_params), project)
    assert address == expected.format(root=project)


def test_an_experiment_in_a_temporary_copy_uses_the_database_of_the_project(project: Path) -> None:
    copy = project / ".dvc/tmp/exps/standalone/tmp123"
    copy.mkdir(parents=True)
    assert lineage.project_root(copy) == project
    assert lineage.project_root(project) == project


def test_the_content_of_shards_does_not_depend_on_how_they_are_cut() -> None:
    index, cut, larger = (
        parse_index(json.dumps(values), "index.json")
        for values in (shard_index("a", 4), shard_index("a", 4, ("11" * 32, "22" * 32)), shard_index("a", 5))
    )
    assert lineage.content_digest(index) == lineage.content_digest(cut)
    assert lineage.content_digest(index) != lineage.content_digest(larger)
    assert lineage.shards_digest(index) != lineage.shards_digest(cut)


def test_shards_at_an_address_are_logged_by_it_and_not_by_what_dvc_has_under_their_name(
    project: Path, config: Config, address: str, host
) -> None:
    host.put("/coco-val/index.json", json.dumps(shard_index("coco-val", 3)).encode())
    lock = "schema: '2.0'\nstages:\n  s:\n    outs:\n    - path: data/shards/coco-val\n      md5: 123abc.dir\n"
    (project / "dvc.lock").write_text(lock)
    with tracked(config, project / ".runs/a") as run:
        run.note_inputs([f"{host.address}/coco-val"], context="validation")
    found = connect(address).get_run(run.run_id).inputs.dataset_inputs[0]
    assert json.loads(found.dataset.source) == {"uri": f"{host.address}/coco-val"}
    assert found.dataset.source_type == "http"
    assert "dvc_md5" not in {tag.key for tag in found.tags}
