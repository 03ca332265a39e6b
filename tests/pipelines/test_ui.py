from __future__ import annotations

import base64
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import cv2
import pytest
import requests

from cigpose.config import Config
from cigpose.config.params_file import write_params
from pipelines import access, processes, ui
from pipelines.tracking.courier import tracked


def fake_server(folder: Path, *command: str, port: int | None = None) -> ui.Server:
    port = port or ui.free_port()
    address = f"http://127.0.0.1:{port}"
    command = command or (sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1")
    return ui.Server(name="Fake", command=command, health=address, address=address, log=folder / f"{port}.log")


def test_servers_are_stopped_when_the_block_ends(tmp_path: Path) -> None:
    servers = [fake_server(tmp_path), fake_server(tmp_path)]
    with ui.running(*servers, root=tmp_path) as started:
        assert all(requests.get(server.address, timeout=5).ok for server in servers)
    assert all(processes.group_members(process.pid) == [] for process in started)


def test_the_first_server_is_stopped_when_the_second_does_not_come_up(tmp_path: Path) -> None:
    good = fake_server(tmp_path)
    bad = fake_server(tmp_path, sys.executable, "-c", "print('starting'); raise SystemExit('the disk is full')")
    words = r"Fake on .* exited with 1; .* ends: .*the disk is full"
    with pytest.raises(ui.ServerError, match=words), ui.running(good, bad, root=tmp_path):
        pytest.fail("must not begin")
    assert ui.is_free(int(good.address.rpartition(":")[2]))


def test_a_server_that_never_answers_is_given_up(tmp_path: Path) -> None:
    hung = fake_server(tmp_path, sys.executable, "-c", "import time; time.sleep(60)")
    with pytest.raises(ui.ServerError, match="did not answer"), ui.running(hung, root=tmp_path, timeout_s=0.5):
        pytest.fail("must not begin")


def test_a_server_that_ends_by_itself_is_noticed(tmp_path: Path) -> None:
    server = fake_server(tmp_path)
    with ui.running(server, root=tmp_path) as started:
        os.kill(started[0].pid, signal.SIGKILL)
        with pytest.raises(ui.ServerError, match="Fake ended with -9"):
            ui.watch([server], started)


def test_while_the_pages_are_up_a_killed_retraining_is_looked_for_and_a_failed_look_harms_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server, looks = fake_server(tmp_path), []

    def look() -> None:
        looks.append(time.monotonic())
        if len(looks) == 2:
            os.kill(started[0].pid, signal.SIGKILL)
        raise RuntimeError("Failed to reach API")

    with ui.running(server, root=tmp_path) as started, pytest.raises(ui.ServerError, match="Fake ended with -9"):
        ui.watch([server], started, look, every_s=0.1)
    assert len(looks) >= 2
    assert "ui: a killed retraining could not be marked: Failed to reach API" in capsys.readouterr().err


def test_ports(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        taken = listener.getsockname()[1]
        monkeypatch.delenv("SOME_PORT", raising=False)
        assert ui.choose_port(taken, "SOME_PORT") != taken
        monkeypatch.setenv("SOME_PORT", str(taken))
        with pytest.raises(ui.ServerError, match=f"SOME_PORT={taken}: another program listens on that port"):
            ui.choose_port(1, "SOME_PORT")
        monkeypatch.setenv("SOME_PORT", "many")
        with pytest.raises(ui.ServerError, match="expected a port number"):
            ui.choose_port(1, "SOME_PORT")
    free = ui.free_port()
    monkeypatch.setenv("SOME_PORT", str(free))
    assert ui.choose_port(1, "SOME_PORT") == free


ROOT = Path(__file__).resolve().parents[2]
EVIL = {"Origin": "http://evil.example"}
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def own_page(prefect: str, token: str) -> requests.Session:
    """A session that asks as Prefect's interface does: what it was told, the password, then the CSRF token."""
    told = requests.get(f"{prefect}/ui-settings", timeout=10).json()
    assert (told["api_url"], told["auth"], told["csrf_enabled"]) == (f"{prefect}/api", "BASIC", True)
    page = requests.Session()
    page.headers.update({"Origin": prefect, "Authorization": f"Basic {base64.b64encode(token.encode()).decode()}"})
    reply = page.get(f"{prefect}/api/csrf-token", params={"client": "page"}, timeout=10)
    assert reply.headers["Access-Control-Allow-Origin"] == prefect
    page.headers.update({"Prefect-Csrf-Client": "page", "Prefect-Csrf-Token": reply.json()["token"]})
    return page


def check_that_no_other_page_can_start_a_run(prefect: str, token: str) -> None:
    page = own_page(prefect, token)

    def ask(path: str, body: dict[str, object]) -> Any:
        reply = page.post(f"{prefect}/api/{path}", json=body, timeout=30)
        reply.raise_for_status()
        return reply.json()

    flow = ask("flows/", {"name": "retrain"})["id"]
    deployment = ask("deployments/", {"name": "served", "flow_id": flow})["id"]
    start = f"{prefect}/api/deployments/{deployment}/create_flow_run"
    body = json.dumps({"parameters": {"overrides": {"data.render.x$(touch f)": {}}}})
    client = {"Prefect-Csrf-Client": "page", "Prefect-Csrf-Token": page.headers["Prefect-Csrf-Token"]}
    for kind in ("application/json", "text/plain", None):
        headers = EVIL | ({"Content-Type": kind} if kind else {})
        assert requests.post(start, data=body, headers=headers, timeout=30).status_code == 403
        assert requests.post(start, data=body, headers=headers | client, timeout=30).status_code == 401
    asked = EVIL | {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "prefect-csrf-token"}
    assert requests.options(start, headers=asked, timeout=30).status_code == 400
    for headers in (EVIL, {"Host": "evil.example"}):  # the second: a name that was pointed at 127.0.0.1
        reply = requests.get(f"{prefect}/api/csrf-token", params={"client": "x"}, headers=headers, timeout=30)
        assert reply.status_code == 401
        assert "Access-Control-Allow-Origin" not in reply.headers
    mine = {"deployments": {"id": {"any_": [deployment]}}}
    assert ask("flow_runs/filter", mine) == []
    assert ask(f"deployments/{deployment}/create_flow_run", {})["deployment_id"] == deployment
    assert len(ask("flow_runs/filter", mine)) == 1


def check_that_no_other_page_can_use(mlflow: str) -> None:
    path, body = f"{mlflow}/ajax-api/2.0/mlflow/experiments/create", {"name": "evil"}
    assert requests.post(path, json=body, headers=EVIL, timeout=30).status_code == 403
    port = mlflow.rpartition(":")[2]
    for host in (f"evil.example:{port}", f"10.0.0.1:{port}", "localhost:1"):
        assert requests.post(path, json=body, headers={"Host": host}, timeout=30).status_code == 403
    assert requests.post(path, json={"name": "own"}, headers={"Origin": mlflow}, timeout=30).ok


def screenshot(address: str, path: Path) -> None:
    assert CHROMIUM is not None
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    command += [f"--user-data-dir={path.parent / 'chromium'}", "--window-size=1400,900", "--virtual-time-budget=10000"]
    subprocess.run([*command, f"--screenshot={path}", address], check=True, capture_output=True, timeout=120)


@pytest.mark.slow
def test_make_ui_brings_both_up_for_their_own_pages_only_draws_them_and_leaves_nothing_behind(
    project: Path, config: Config
) -> None:
    write_params(config, project / "params.yaml")
    shutil.copy(ROOT / "prefect.yaml", project)
    (project / "pipelines").symlink_to(ROOT / "pipelines")
    with tracked(config, project / ".runs/a") as run:
        for step in range(20):
            run.log_record({"kind": "log", "step": step, "loss": 1 / (step + 1)})
    ports = {"PREFECT_SERVER_API_PORT": str(ui.free_port()), "MLFLOW_PORT": str(ui.free_port())}
    prefect, mlflow = (f"http://127.0.0.1:{port}" for port in ports.values())
    log = (project / "ui.log").open("w")
    process = processes.start([sys.executable, "-m", "pipelines.ui"], cwd=project, env=ports, output=log)
    try:
        deadline = time.monotonic() + 300
        while (
            "Ctrl-C" not in (project / "ui.log").read_text() and time.monotonic() < deadline and process.poll() is None
        ):
            time.sleep(0.2)
        printed = (project / "ui.log").read_text()
        assert f"Prefect  {prefect}\n" in printed
        assert f"MLflow   {mlflow}/#/experiments/1/runs?workflowType=machine_learning&viewStateShareKey=" in printed
        token = (project / ".prefect/token").read_text()
        assert f"Prefect's page asks once for a password: {token}\n" in printed
        assert "\nDeployments: nightly, on-new-data, manual.\n" in printed
        second = subprocess.run([sys.executable, "-m", "pipelines.ui"], capture_output=True, text=True, timeout=120)
        assert second.returncode == 0 and f"is running already (process {process.pid} on " in second.stdout
        assert second.stdout.endswith(f"Prefect  {prefect}\nMLflow   {mlflow}\n")
        check_that_no_other_page_can_start_a_run(prefect, token)
        check_that_no_other_page_can_use(mlflow)
        assert (project / ".prefect/api_url").read_text().strip() == f"{prefect}/api"
        assert (project / ".prefect/prefect.db").is_file()
        servers = [int(line) for line in _children(process.pid)]
        assert len(servers) >= 2
        state = json.loads((project / ".runs/a/sync.json").read_text())
        if CHROMIUM:
            screenshot(
                f"{mlflow}/#/experiments/{state['experiment_id']}/runs/{run.run_id}/model-metrics", project / "m.png"
            )
            screenshot(f"{prefect}/dashboard", project / "p.png")
            for name in ("m.png", "p.png"):  # a page that was not drawn is of one colour
                assert cv2.imread(str(project / name)).std() > 5, name
            if os.environ.get("CIGPOSE_KEEP_SCREENSHOTS"):
                for name in ("m.png", "p.png"):
                    shutil.copy(project / name, os.environ["CIGPOSE_KEEP_SCREENSHOTS"])
    finally:
        process.send_signal(signal.SIGINT)
        try:
            assert process.wait(60) == 0
        finally:
            processes.stop_group(process)
            log.close()
    assert (project / "ui.log").read_text().endswith("Stopped.\n")
    assert not (project / ".prefect/api_url").exists()
    assert access.read_pages(project) == access.Pages(prefect=prefect, mlflow=mlflow)  # the next takes these ports
    assert all(processes.group_members(server) == [] for server in servers)
    if CHROMIUM is None:
        pytest.skip("all of it holds, but without chromium nobody saw whether the pages are drawn")


def test_the_token_is_its_owners_alone_and_stays_the_same(project: Path) -> None:
    token = access.server_token(project)
    assert len(token) >= 32
    assert (project / ".prefect/token").stat().st_mode & 0o777 == 0o600
    assert access.server_token(project) == token
    assert ui.prefect_server(project, 4200).env["PREFECT_SERVER_API_AUTH_STRING"] == token
    (project / ".prefect/token").chmod(0o644)
    with pytest.raises(PermissionError, match=r"token: others on this machine can read the token\. Delete it"):
        access.server_token(project)


def _children(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


@pytest.mark.slow
def test_a_broken_params_file_is_one_sentence(project: Path) -> None:
    (project / "params.yaml").write_text("name: x\nsed: 1\n")
    run = subprocess.run([sys.executable, "-m", "pipelines.ui"], cwd=project, capture_output=True, text=True)
    assert run.returncode == 1
    assert run.stderr.startswith("ui: ")
    assert "params.yaml: sed: unknown key. Did you mean 'seed'?" in run.stderr
    assert "Traceback" not in run.stderr
