from __future__ import annotations

import base64
import functools
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests
import yaml
from toy_stages import DVC, ORDER, dvc, make_toy, run, stage_group, tree, wait_for
from webhook import SECRET, Webhook, webhook_here

from cigpose.config import Config, config_from_mapping, load_params, load_preset, presets
from cigpose.config.params_file import write_params
from cigpose.config.schema import ConfigError
from pipelines import processes, retrain, ui
from pipelines.retraining.comparison import metric_rows
from pipelines.retraining.overrides import asked_config
from pipelines.tracking.address import UnreachableError, connect


@pytest.fixture
def toy(project: Path, config: Config) -> Path:
    return make_toy(project, config)


def test_stages_come_in_the_order_of_work_and_a_foreach_is_one(toy: Path) -> None:
    assert retrain.stages(toy) == ORDER


def test_the_stages_of_this_project_are_known_to_the_policies(root: Path) -> None:
    assert set(yaml.safe_load((root / "dvc.yaml").read_text())["stages"]) == set(retrain.POLICIES)


def test_a_dvc_file_that_cannot_be_read_is_named(toy: Path) -> None:
    (toy / "dvc.yaml").write_text("stages: [")
    with pytest.raises(retrain.StageError, match=r"dvc\.yaml: "):
        retrain.stages(toy)


@pytest.mark.parametrize(("first", "expected"), [(None, ORDER), ("render", ORDER), ("evaluate", ORDER[3:])])
def test_starting_from_a_stage(first: str | None, expected: list[str]) -> None:
    assert retrain.stages_from(ORDER, first) == expected


def test_starting_from_a_stage_that_does_not_exist() -> None:
    with pytest.raises(retrain.StageError, match=r"no stage 'trains' in dvc\.yaml\. Stages: render, download"):
        retrain.stages_from(ORDER, "trains")


def test_overrides_are_checked_and_told_and_nothing_is_written(project: Path, config: Config) -> None:
    path = project / "params.yaml"
    write_params(config, path)
    before = path.read_bytes()
    asked, changes = asked_config(path, None, {"train.epochs": 9, "seed": 0, "data.render.rendered-val.num_images": 50})
    assert changes == {"train.epochs": (4, 9), "data.render.rendered-val.num_images": (160, 50)}
    assert (asked.train.epochs, asked.data.render["rendered-val"].num_images) == (9, 50)
    asked, _ = asked_config(path, None, {"data.locations": {"rendered-val": "s3://people/val"}})
    assert asked.data.locations == {"rendered-val": "s3://people/val"}
    asked, changes = asked_config(path, "cigpose-m_coco_256x192", {"seed": 5})
    assert (asked.name, asked.seed, list(changes)) == (load_preset("cigpose-m_coco_256x192").name, 5, ["seed"])
    with pytest.raises(ConfigError, match=r"preset 'quickstar' does not exist\. Known: "):
        asked_config(path, "quickstar", {})
    assert path.read_bytes() == before


RENDERED = {"seed": 1, "num_images": 4, "image_size": [64, 64]}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"train.epoch": 9}, "train.epoch: unknown key. Did you mean 'train.epochs'"),
        ({"train.epochs": "many"}, "train.epochs: expected int"),
        ({"train.batch_total": 3}, "batch_total must be a multiple of"),
        ({"trains.epochs": 9}, "trains.epochs: unknown key. Did you mean 'train.epochs'"),
        ({"seed.x": 9}, "seed.x: unknown key"),
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
        asked_config(path, None, overrides)
    assert path.read_bytes() == before


def test_a_stage_that_fails_at_once_is_not_tried_again_but_one_that_fails_late_is() -> None:
    early, late = retrain.StageError("early"), retrain.StageError("late")
    early.seconds, late.seconds = 5, 500
    train, download = retrain.POLICIES["train"], retrain.POLICIES["download"]
    assert [train.allows_retry(early), train.allows_retry(late)] == [False, True]
    assert download.allows_retry(early)
    assert not train.allows_retry(KeyboardInterrupt())


def test_registering_waits_for_an_mlflow_that_is_away_for_a_minute_and_for_nothing_else() -> None:
    policy, soon = retrain.POLICIES["register"], 5.0
    with pytest.raises(UnreachableError) as away:
        connect(f"http://127.0.0.1:{ui.free_port()}")
    unreachable, wrong = retrain.StageError(f"register: {away.value}"), retrain.StageError("register: no whole/AP.")
    unreachable.seconds = wrong.seconds = soon
    assert policy.allows_retry(unreachable) and not policy.allows_retry(wrong)
    assert policy.retries * (policy.retry_delay_s + soon) > 60


@pytest.mark.slow
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
    assert metric_rows(nested) == [{"part": "whole", "AP": 0.6123, "AR": 0.7}, {"part": "body", "AP": 0.8}]
    assert metric_rows({"AP": 0.5}) == [{"name": "AP", "value": 0.5}]


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
def test_while_a_training_runs_make_retrain_with_an_override_touches_neither_its_params_nor_its_lock(
    toy: Path, tmp_path: Path
) -> None:
    """And Prefect's state is in the project, not at home."""
    home = tmp_path / "home"
    home.mkdir()
    (toy / "control/slow").write_text("train:here")
    with (toy / "repro.log").open("w") as log:
        training = processes.start([sys.executable, "-m", "dvc", "repro"], cwd=toy, output=log)
    try:
        wait_for(lambda: (toy / "control/pids").exists())
        before = tree(toy)
        done = run(toy, "pipelines.retrain", "-S", "train.epochs=7", HOME=str(home))
        assert done.returncode == 0, done.stdout + done.stderr
        assert tree(toy) == before
        (toy / "control/slow").write_text("")
        assert training.wait(60) == 0, (toy / "repro.log").read_text()
    finally:
        processes.stop_group(training)
    assert load_params(toy / "params.yaml").train.epochs == trained_epochs(toy) == 4
    (name,) = dvc(toy, "exp", "list", "--name-only").split()
    assert done.stdout.strip() == f"toy: version 3 is the new champion. `dvc exp apply {name}` takes it."
    dvc(toy, "exp", "apply", name)
    assert load_params(toy / "params.yaml").train.epochs == trained_epochs(toy) == 7
    assert json.loads((toy / "data/registered.json").read_text())["experiment"] == name
    at_work = [line for line in done.stderr.splitlines() if line.endswith("at work")]
    assert [line.partition("Task run '")[2].split("'")[0] for line in at_work] == ["train", "evaluate", "register"]
    assert "train.epochs was 4, is 7 in this run" in done.stderr
    assert (toy / ".prefect/prefect.db").is_file() and not (home / ".prefect").exists()


def trained_epochs(folder: Path) -> int:
    stages = yaml.safe_load((folder / "dvc.lock").read_text())["stages"]
    return stages["train"]["params"]["params.yaml"]["train.epochs"]


class Prefect:
    """A real Prefect server on loopback, and the process that serves the deployments of prefect.yaml."""

    def __init__(self, folder: Path, server: ui.Server) -> None:
        self.folder = folder
        self.env = {"PREFECT_API_URL": f"{server.address}/api", "PREFECT_HOME": str(folder / ".prefect")}
        self.env |= {"PREFECT_API_AUTH_STRING": server.env["PREFECT_API_AUTH_STRING"]}
        self.env |= {"PREFECT_RUNNER_POLL_FREQUENCY": "1", "PREFECT_LOGGING_TO_API_BATCH_INTERVAL": "0.2"}

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

    def start_run(self, deployment: str = "manual", **parameters: Any) -> str:
        deployment = self.ask(f"deployments/name/retrain/{deployment}")["id"]
        return self.ask(f"deployments/{deployment}/create_flow_run", {"parameters": parameters})["id"]

    def state(self, run_id: str) -> dict[str, Any]:
        return self.ask(f"flow_runs/{run_id}")["state"]

    def wait_end(self, run_id: str) -> dict[str, Any]:
        ended = ("COMPLETED", "FAILED", "CANCELLED", "CRASHED")
        return wait_for(lambda: (state := self.state(run_id))["type"] in ended and state)

    def by_hand(self) -> list[dict[str, Any]]:
        """Flow runs of no deployment, the newest first."""
        filters = {"flow_runs": {"deployment_id": {"is_null_": True}}, "sort": "START_TIME_DESC"}
        return self.ask("flow_runs/filter", filters)

    def lines(self, run_id: str) -> list[str]:
        found = self.ask("logs/filter", {"logs": {"flow_run_id": {"any_": [run_id]}}, "limit": 200})
        return [entry["message"] for entry in found]


@pytest.fixture
def webhook(toy: Path, config: Config) -> Iterator[Webhook]:
    """Told of the toy's retrainings."""
    with webhook_here() as webhook:
        values = config.to_mapping()
        values["notify"]["webhook"] = webhook.address
        write_params(config_from_mapping(values), toy / "params.yaml")
        yield webhook


@pytest.fixture
def prefect(toy: Path, webhook: Webhook) -> Iterator[Prefect]:
    server = ui.prefect_server(toy, ui.free_port())
    with ui.running(server, root=toy, timeout_s=300):
        made = Prefect(toy, server)
        with ui.running(ui.deployments_server(toy, made.env), root=toy) as (made.serving,):
            yield made


@pytest.mark.slow
def test_the_deployment_is_scheduled_runs_fails_in_the_stages_words_and_is_cancelled_whole(
    toy: Path, prefect: Prefect, webhook: Webhook
) -> None:
    """One story on one server, since starting it takes longest."""
    filters = {"flow_runs": {"state": {"type": {"any_": ["SCHEDULED"]}}}, "sort": "EXPECTED_START_TIME_ASC"}
    scheduled = wait_for(lambda: prefect.ask("flow_runs/filter", filters))  # the pins of fastapi and sqlalchemy hold
    assert scheduled[0]["auto_scheduled"]
    assert scheduled[0]["state"]["name"] == "Scheduled"
    check_the_deployments(prefect)

    before = tree(toy)
    first = prefect.start_run(overrides={"train.epochs": 6})
    assert prefect.wait_end(first)["type"] == "COMPLETED", prefect.lines(first)
    assert prefect.ask(f"flow_runs/{first}")["name"].endswith(": train.epochs=6")
    tasks = prefect.ask("task_runs/filter", {"flow_runs": {"id": {"any_": [first]}}, "sort": "EXPECTED_START_TIME_ASC"})
    assert [task["name"] for task in tasks] == ORDER
    lines = wait_for(lambda: (found := prefect.lines(first)) and "register at work" in found and found)
    assert "params.yaml: train.epochs was 4, is 6 in this run." in lines
    found = prefect.ask("artifacts/filter", {"artifacts": {"flow_run_id": {"any_": [first]}}})
    artifacts = {item["key"]: item for item in found}
    table = json.loads(artifacts["retrain-metrics"]["data"])
    assert table[0] == {"part": "whole", "AP": 0.61, "AR": 0.7}
    assert "version 3 is the new champion" in artifacts["retrain-registered"]["data"]
    assert "http://127.0.0.1:5000/#/runs/1" in artifacts["retrain-mlflow"]["data"]

    (toy / "control/fail").write_text("register")
    failed = prefect.wait_end(second := prefect.start_run(force=["register"], start_from="register"))
    assert (failed["type"], failed["message"]) == (
        "FAILED",
        "register: annotation 7: foot_kpts has 15 numbers, expected 18." + 60 * " Look at the file.",
    ), prefect.lines(second)
    (toy / "control/fail").write_text("")

    (toy / "control/slow").write_text("train")
    third = prefect.start_run(overrides={"train.epochs": 7})
    group = stage_group(toy)
    refused = prefect.wait_end(prefect.start_run())
    assert refused["type"] == "CANCELLED"  # after hours perhaps
    started = time.monotonic()
    busy = run(toy, "pipelines.retrain", "-S", "train.epochs=8")
    assert busy.returncode == 1 and time.monotonic() - started < 30
    assert (
        "retrain: A retraining of this project is running already (process " in busy.stderr and " ago)" in busy.stderr
    )
    assert len(busy.stderr.splitlines()) == 1
    prefect.command("flow-run", "cancel", third)
    assert prefect.wait_end(third)["type"] == "CANCELLED"
    wait_for(lambda: processes.group_members(group) == [], timeout_s=10)
    looked = prefect.wait_end(prefect.start_run("on-new-data", only_if_new_data=True))
    assert (looked["name"], looked["message"]) == (
        "No new data",
        "No shard would change: all sources are as they were.",
    )
    check_that_a_killed_run_is_marked_by_the_next(toy, prefect)
    assert tree(toy) == before
    assert len(dvc(toy, "exp", "list", "--name-only").split()) == 1  # of the run that came to its end
    check_that_whoever_stops_serving_stops_the_run_at_work(toy, prefect)
    champion, failure = webhook.texts  # and nobody is told of what was cancelled, or did nothing
    assert champion.startswith(":trophy: New champion: retrain-") and "toy: version 3 is the new champion." in champion
    assert failure.startswith(":x: Retraining failed: retrain-") and "register: annotation 7: foot_kpts" in failure
    assert SECRET not in "".join(path.read_text() for path in toy.rglob("*.log"))
    prefect.command("work-pool", "create", "local", "--type", "process")
    prefect.command("--no-prompt", "deploy", "--all")  # the same for a worker
    assert prefect.ask("deployments/name/retrain/nightly")["work_pool_name"] == "local"


def check_the_deployments(prefect: Prefect) -> None:
    nightly, new_data, manual = (
        prefect.ask(f"deployments/name/retrain/{name}") for name in ("nightly", "on-new-data", "manual")
    )
    (when,) = (item["schedule"] for item in nightly["schedules"])
    assert (when["cron"], when["timezone"], manual["schedules"]) == ("0 3 * * *", "UTC", [])
    assert new_data["parameters"] == {"only_if_new_data": True}
    offered = manual["parameter_openapi_schema"]["properties"]
    assert offered["preset"]["enum"] == ["params.yaml", *presets()]
    assert offered["force"]["items"]["enum"] == ["all", *DVC] and offered["start_from"]["enum"][1:] == list(DVC)
    with pytest.raises(requests.HTTPError) as refused:
        prefect.start_run(preset="quickstar")
    reply = refused.value.response
    assert reply.status_code == 409 and "'quickstar' is not one of ['params.yaml'" in reply.text


def check_that_whoever_stops_serving_stops_the_run_at_work(toy: Path, prefect: Prefect) -> None:
    """As Ctrl-C of `make ui` does; Prefect's own handler left run and stage behind."""
    run_id = prefect.start_run(overrides={"train.epochs": 9})
    group = stage_group(toy)
    prefect.serving.terminate()
    assert prefect.serving.wait(40) == 0
    assert processes.group_members(group) == processes.group_members(prefect.serving.pid) == []
    state = prefect.state(run_id)
    assert (state["type"], state["message"]) == ("CANCELLED", "Runner is shutting down.")


def check_that_a_killed_run_is_marked_by_the_next(toy: Path, prefect: Prefect) -> None:
    (toy / ".prefect/api_url").write_text(prefect.env["PREFECT_API_URL"])  # as `make ui` does
    command = [sys.executable, "-m", "pipelines.retrain", "-S", "train.epochs=6", "--force", "train"]
    with (toy / "killed.log").open("w") as log:
        flow = processes.start(command, cwd=toy, output=log)
    group = stage_group(toy)
    wait_for(lambda: "train at work anew" in (toy / "killed.log").read_text())
    flow.kill()
    flow.wait()
    (killed,) = prefect.by_hand()
    assert killed["state"]["type"] == "RUNNING" and killed["name"].endswith(": train.epochs=6, train anew")
    assert processes.group_members(group)

    done = run(toy, "pipelines.retrain", "-S", "train.epochs=6")
    assert done.returncode == 0, done.stderr
    state = prefect.state(killed["id"])
    assert (state["type"], state["name"]) == ("CRASHED", "Killed") and "Its process is gone" in state["message"]
    assert f"Flow run {killed['id']} was killed; it is marked now." in done.stderr
    assert not processes.group_members(group)
    next_run = prefect.by_hand()[0]
    assert (next_run["state"]["type"], next_run["state"]["name"]) == ("COMPLETED", "Up to date")
    assert not prefect.ask("artifacts/filter", {"artifacts": {"flow_run_id": {"any_": [next_run["id"]]}}})
