from __future__ import annotations

import base64
import functools
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests
import yaml

from cigpose.config import Config, load_params
from cigpose.config.params_file import write_params
from cigpose.config.schema import ConfigError
from pipelines import processes, retrain, ui

STAGE = """
import json, pathlib, subprocess, sys, time
name, out = sys.argv[1], pathlib.Path(sys.argv[2])
if name in pathlib.Path("fail").read_text().split():
    print("WARNING: some advice", flush=True)
    sys.exit("annotation 7: foot_kpts has 15 numbers, expected 18.")
print(f"{name} at work", flush=True)
if name in pathlib.Path("slow").read_text().split():
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    pathlib.Path("pids").write_text(f"{child.pid}")
    print("waiting", flush=True)
    time.sleep(600)
out.parent.mkdir(parents=True, exist_ok=True)
answers = {"evaluate": {"whole": {"AP": 0.61, "AR": 0.7}, "body": {"AP": 0.8, "AR": 0.9}},
           "register": {"model": "toy", "version": 3, "decision_text": "toy: version 3 is the new champion.",
                        "url": "http://127.0.0.1:5000/#/runs/1"}}
out.write_text(json.dumps(answers.get(name, name)))
"""
# Not in the order of work, as nothing asks dvc.yaml to be.
DVC = {
    "register": {"cmd": "python stage.py register data/registered.json", "deps": ["data/metrics/evaluate.json"],
                 "outs": ["data/registered.json"]},
    "render": {"foreach": "${data.render}",
               "do": {"cmd": "python stage.py render data/raw/${key}", "outs": ["data/raw/${key}"]}},
    "download": {"foreach": "${data.download.drive_ids}",
                 "do": {"cmd": "python stage.py download data/raw/${key}", "outs": ["data/raw/${key}"]}},
    "train": {"cmd": "python stage.py train data/model", "deps": ["data/raw"], "params": ["train.epochs"],
              "outs": ["data/model"]},
    "evaluate": {"cmd": "python stage.py evaluate data/metrics/evaluate.json", "deps": ["data/model"],
                 "outs": ["data/metrics/evaluate.json"]},
}  # fmt: skip
ORDER = ["render", "train", "evaluate", "register"]


@pytest.fixture
def toy(project: Path, config: Config, root: Path) -> Path:
    """A real DVC project of trivial stages, with the deployments of this checkout."""
    return make_toy(project, config, root)


def make_toy(folder: Path, config: Config, root: Path) -> Path:
    (folder / "stage.py").write_text(STAGE)
    (folder / "dvc.yaml").write_text(yaml.safe_dump({"stages": DVC}, sort_keys=False))
    write_params(config, folder / "params.yaml")
    (folder / "fail").write_text("")
    (folder / "slow").write_text("")
    (folder / "pipelines").symlink_to(root / "pipelines")
    shutil.copy(root / "prefect.yaml", folder)
    run(folder, "dvc", "init", "--no-scm", "--quiet")
    return folder


def run(folder: Path, *command: str, **env: str) -> subprocess.CompletedProcess[str]:
    full = [sys.executable, "-m", *command]
    env = processes.environment(env)
    return subprocess.run(full, cwd=folder, env=env, capture_output=True, text=True, timeout=240, check=False)


def wait_for(what: Callable[[], Any], timeout_s: float = 240.0) -> Any:
    deadline = time.monotonic() + timeout_s
    while not (found := what()):
        assert time.monotonic() < deadline, what
        time.sleep(0.2)
    return found


def test_stages_come_in_the_order_of_work_and_a_foreach_is_one(toy: Path) -> None:
    assert retrain.stages(toy) == ORDER


def test_the_stages_of_this_project_are_known_to_the_policies(root: Path) -> None:
    assert set(yaml.safe_load((root / "dvc.yaml").read_text())["stages"]) == set(retrain.POLICIES)


def test_a_dvc_file_that_cannot_be_read_is_named(toy: Path) -> None:
    (toy / "dvc.yaml").write_text("stages: [")
    with pytest.raises(retrain.StageError, match=r"dvc\.yaml: "):
        retrain.stages(toy)


@pytest.mark.parametrize(("first", "expected"), [(None, ORDER), ("render", ORDER), ("evaluate", ORDER[2:])])
def test_starting_from_a_stage(first: str | None, expected: list[str]) -> None:
    assert retrain.stages_from(ORDER, first) == expected


def test_starting_from_a_stage_that_does_not_exist() -> None:
    with pytest.raises(retrain.StageError, match=r"no stage 'trains' in dvc\.yaml\. Stages: render, train"):
        retrain.stages_from(ORDER, "trains")


def test_overrides_are_written_to_params_and_told(project: Path, config: Config) -> None:
    path = project / "params.yaml"
    write_params(config, path)
    changes = retrain.apply_overrides(path, {"train.epochs": 9, "seed": 0, "data.render.rendered-val.num_images": 50})
    assert changes == {"train.epochs": (4, 9), "data.render.rendered-val.num_images": (160, 50)}
    assert load_params(path).train.epochs == 9
    assert load_params(path).data.render["rendered-val"].num_images == 50
    retrain.apply_overrides(path, {"data.locations": {"rendered-val": "s3://people/val"}})
    assert load_params(path).data.locations == {"rendered-val": "s3://people/val"}


RENDERED = {"seed": 1, "num_images": 4, "image_size": [64, 64]}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"train.epoch": 9}, "train.epoch: unknown key. Did you mean 'epochs'"),
        ({"train.epochs": "many"}, "train.epochs: expected int"),
        ({"train.batch_total": 3}, "batch_total must be a multiple of"),
        ({"trains.epochs": 9}, "'trains' is not a section"),
        ({"seed.x": 9}, "'seed' is not a section"),
        ({"data.render.mine": RENDERED}, "overrides: data.render.mine: unknown key"),
        ({"data.render.x$(touch f)": RENDERED}, r"overrides: data\.render\.x\$\(touch f\): unknown key"),
        ({"data.locations.rendered-val": "s3://a/b"}, "overrides: data.locations.rendered-val: unknown key"),
        ({"data.render": {"x$(touch f)": RENDERED}}, r"data\.render: 'x\$\(touch f\)' cannot be used as a key"),
        ({"train.epochs": 9, "name": "../../x"}, "name: '../../x' cannot be used as a name"),
        ({"": 9}, "overrides: : unknown key"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_wrong_override_leaves_params_untouched(project: Path, config: Config, overrides, message) -> None:
    path = project / "params.yaml"
    write_params(config, path)
    before = path.read_bytes()
    with pytest.raises(ConfigError, match=message):
        retrain.apply_overrides(path, overrides)
    assert path.read_bytes() == before


def test_a_stage_that_fails_at_once_is_not_tried_again_but_one_that_fails_late_is() -> None:
    early, late = retrain.StageError("early"), retrain.StageError("late")
    early.seconds, late.seconds = 5, 500
    train, download = retrain.POLICIES["train"], retrain.POLICIES["download"]
    assert [train.allows_retry(early), train.allows_retry(late)] == [False, True]
    assert download.allows_retry(early)
    assert not train.allows_retry(KeyboardInterrupt())


def test_importing_the_flow_asks_no_server(toy: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        (toy / ".prefect").mkdir()
        (toy / ".prefect/api_url").write_text(f"http://127.0.0.1:{listener.getsockname()[1]}/api")
        assert run(toy, "pydoc", "pipelines.retrain").returncode == 0
        listener.setblocking(False)
        with pytest.raises(BlockingIOError):
            listener.accept()


def test_metrics_become_rows() -> None:
    nested = {"whole": {"AP": 0.61234, "AR": 0.7}, "body": {"AP": 0.8}}
    assert retrain.metric_rows(nested) == [{"part": "whole", "AP": 0.6123, "AR": 0.7}, {"part": "body", "AP": 0.8}]
    assert retrain.metric_rows({"AP": 0.5}) == [{"name": "AP", "value": 0.5}]


STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
child = "import signal, time; [signal.signal(n, signal.SIG_IGN) for n in (2, 15)]; "
child += "print('ready', flush=True); time.sleep(600)"
subprocess.Popen([sys.executable, "-c", child])
time.sleep(600)
"""


def test_interrupting_a_command_ends_its_group_even_if_it_ignores_signals(tmp_path: Path) -> None:
    groups: list[int] = []

    def on_line(line: str) -> None:
        groups.extend(os.getpgid(child.pid) for child in psutil.Process().children(recursive=True))
        raise KeyboardInterrupt

    grace = ((signal.SIGINT, 0.3), (signal.SIGTERM, 0.3), (signal.SIGKILL, 5.0))
    with pytest.raises(KeyboardInterrupt):
        processes.run_logged([sys.executable, "-c", STUBBORN], cwd=tmp_path, on_line=on_line, grace=grace)
    own = {group for group in groups if group != os.getpgid(0)}
    assert len(own) >= 1
    assert [processes.group_members(group) for group in own] == [[] for _ in own]


@pytest.mark.slow
def test_make_retrain_runs_the_stages_and_keeps_prefects_state_in_the_project(toy: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    done = run(toy, "pipelines.retrain", "-S", "train.epochs=7", HOME=str(home))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip().endswith("toy: version 3 is the new champion.")
    at_work = [line for line in done.stderr.splitlines() if line.endswith("at work")]
    assert [line.partition("Task run '")[2].split("'")[0] for line in at_work] == ["render", *ORDER]
    assert "train.epochs was 4, is 7 now" in done.stderr
    assert load_params(toy / "params.yaml").train.epochs == 7
    assert (toy / ".prefect/prefect.db").is_file()
    assert not (home / ".prefect").exists()


class Prefect:
    """A real Prefect server on loopback, with the deployments of prefect.yaml and a worker."""

    def __init__(self, folder: Path, server: ui.Server) -> None:
        self.folder = folder
        self.env = {"PREFECT_API_URL": f"{server.address}/api", "PREFECT_HOME": str(folder / ".prefect")}
        self.env |= {"PREFECT_API_AUTH_STRING": server.env["PREFECT_API_AUTH_STRING"]}
        self.env |= {"PREFECT_WORKER_QUERY_SECONDS": "1", "PREFECT_LOGGING_TO_API_BATCH_INTERVAL": "0.2"}

    def command(self, *command: str) -> str:
        done = run(self.folder, "prefect", *command, **self.env)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    @functools.cache  # noqa: B019  (one server lives as long as its test)
    def session(self) -> requests.Session:
        session, token = requests.Session(), self.env["PREFECT_API_AUTH_STRING"]
        session.headers["Authorization"] = f"Basic {base64.b64encode(token.encode()).decode()}"
        csrf = session.get(f"{self.env['PREFECT_API_URL']}/csrf-token", params={"client": "test"}, timeout=30).json()
        session.headers.update({"Prefect-Csrf-Client": "test", "Prefect-Csrf-Token": csrf["token"]})
        return session

    def ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        address, session = f"{self.env['PREFECT_API_URL']}/{path}", self.session()
        for _ in range(10):
            reply = session.get(address, timeout=30) if body is None else session.post(address, json=body, timeout=30)
            if reply.status_code != 503:  # sqlite is busy: Prefect's own client asks again too
                break
            time.sleep(0.5)
        reply.raise_for_status()
        return reply.json()

    def start_run(self, **parameters: Any) -> str:
        deployment = self.ask("deployments/name/retrain/weekly")["id"]
        return self.ask(f"deployments/{deployment}/create_flow_run", {"parameters": parameters})["id"]

    def state(self, run_id: str) -> dict[str, Any]:
        return self.ask(f"flow_runs/{run_id}")["state"]

    def wait_end(self, run_id: str) -> dict[str, Any]:
        ended = ("COMPLETED", "FAILED", "CANCELLED", "CRASHED")
        return wait_for(lambda: (state := self.state(run_id))["type"] in ended and state)

    def lines(self, run_id: str) -> list[str]:
        found = self.ask("logs/filter", {"logs": {"flow_run_id": {"any_": [run_id]}}, "limit": 200})
        return [entry["message"] for entry in found]


@pytest.fixture
def prefect(toy: Path) -> Iterator[Prefect]:
    server = ui.prefect_server(toy, ui.free_port())
    with ui.running(server, root=toy, timeout_s=300):
        made = Prefect(toy, server)
        made.command("work-pool", "create", "local", "--type", "process")
        made.command("--no-prompt", "deploy", "--all")
        with (toy / "worker.log").open("w") as log:
            command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", "local"]
            # From another folder: the deployment knows its own.
            worker = processes.start(command, cwd=toy.parent, env=made.env, output=log)
            try:
                yield made
            finally:
                processes.stop_group(worker, ((signal.SIGINT, 20.0), (signal.SIGKILL, 5.0)))


@pytest.mark.slow
def test_the_deployment_is_scheduled_runs_fails_in_the_stages_words_and_is_cancelled_whole(
    toy: Path, prefect: Prefect
) -> None:
    """One story on one server, since starting it takes longest."""
    filters = {"flow_runs": {"state": {"type": {"any_": ["SCHEDULED"]}}}, "sort": "EXPECTED_START_TIME_ASC"}
    scheduled = wait_for(lambda: prefect.ask("flow_runs/filter", filters))  # the pins of fastapi and sqlalchemy hold
    assert scheduled[0]["auto_scheduled"]
    assert scheduled[0]["state"]["name"] == "Scheduled"

    first = prefect.start_run(overrides={"train.epochs": 6})
    assert prefect.wait_end(first)["type"] == "COMPLETED", prefect.lines(first)
    tasks = prefect.ask("task_runs/filter", {"flow_runs": {"id": {"any_": [first]}}, "sort": "EXPECTED_START_TIME_ASC"})
    assert [task["name"] for task in tasks] == ORDER
    lines = wait_for(lambda: (found := prefect.lines(first)) and "register at work" in found and found)
    assert "params.yaml: train.epochs was 4, is 6 now." in lines
    found = prefect.ask("artifacts/filter", {"artifacts": {"flow_run_id": {"any_": [first]}}})
    artifacts = {item["key"]: item for item in found}
    table = json.loads(artifacts["retrain-metrics"]["data"])
    assert table[0] == {"part": "whole", "AP": 0.61, "AR": 0.7}
    assert "version 3 is the new champion" in artifacts["retrain-registered"]["data"]
    assert "http://127.0.0.1:5000/#/runs/1" in artifacts["retrain-mlflow"]["data"]
    if os.environ.get("CIGPOSE_KEEP_SCREENSHOTS"):
        _keep_pictures(prefect, first)

    (toy / ".prefect/api_url").write_text(prefect.env["PREFECT_API_URL"])  # as `make ui` does
    joined = run(toy, "pipelines.retrain", "--from", "register")
    assert joined.returncode == 0, joined.stderr
    by_hand = prefect.ask("flow_runs/filter", {"flow_runs": {"deployment_id": {"is_null_": True}}})
    assert [entry["state"]["type"] for entry in by_hand] == ["COMPLETED"]
    assert wait_for(lambda: any("register" in line for line in prefect.lines(by_hand[0]["id"])))

    (toy / "fail").write_text("evaluate")
    failed = prefect.wait_end(second := prefect.start_run(force=True, start_from="evaluate"))
    assert failed["type"] == "FAILED", prefect.lines(second)
    assert "StageError: evaluate: annotation 7: foot_kpts has 15 numbers, expected 18." in failed["message"]
    (toy / "fail").write_text("")

    (toy / "slow").write_text("train")
    third = prefect.start_run(overrides={"train.epochs": 7})
    wait_for(lambda: (toy / "pids").exists() and (toy / "pids").read_text())
    refused = prefect.wait_end(prefect.start_run())
    assert refused["type"] == "CANCELLED"  # DVC would refuse it, after hours perhaps
    grandchild = psutil.Process(int((toy / "pids").read_text()))
    group = os.getpgid(grandchild.pid)
    assert len(processes.group_members(group)) >= 3
    prefect.command("flow-run", "cancel", third)
    assert prefect.wait_end(third)["type"] == "CANCELLED"
    wait_for(lambda: processes.group_members(group) == [], timeout_s=10)
    (toy / "slow").write_text("")

    done = run(toy, "dvc", "repro")  # the workspace is neither locked nor half made
    assert done.returncode == 0, done.stderr


def _keep_pictures(prefect: Prefect, run_id: str) -> None:
    base = prefect.env["PREFECT_API_URL"].removesuffix("/api")
    pages = ("runs", f"runs/flow-run/{run_id}", "deployments", "v2/artifacts")
    for number, page in zip(itertools.count(), pages, strict=False):
        target = f"--screenshot={os.environ['CIGPOSE_KEEP_SCREENSHOTS']}/prefect-{number}.png"
        command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1400,900"]
        command += [f"--user-data-dir={prefect.folder / 'chromium'}", "--virtual-time-budget=20000", target]
        subprocess.run([*command, f"{base}/{page}"], capture_output=True, timeout=120)
