"""`make ui`: Prefect's server, MLflow's, and a process that runs the deployments of prefect.yaml, until Ctrl-C.

Ports: PREFECT_SERVER_API_PORT and MLFLOW_PORT, else those of the last time, else 4200 and 5000; where these are taken
and were not asked for, a free one is used. A server that PREFECT_API_URL or the tracking address already names is not
started again. A second `make ui` of a project says where the first one is.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from urllib.parse import urlsplit

import requests
from mlflow.exceptions import MlflowException

from cigpose.config import Config, load_params
from cigpose.files.addresses import without_credentials
from cigpose.files.atomic import ClaimedError, claimed
from pipelines.access import SERVING, TOKEN, Pages, address_note, guarded_server, prefect_home, read_pages, write_pages
from pipelines.lineage import project_root
from pipelines.processes import start, stop_group
from pipelines.retraining.turn import clear_if_killed
from pipelines.tracking.address import artifact_folder, connect, experiment_url, tracking_address
from pipelines.tracking.sync import EXPERIMENT_TAGS

START_TIMEOUT_S = 240.0
HOST = "127.0.0.1"
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_STOP = ((signal.SIGTERM, 10.0), (signal.SIGKILL, 5.0))


class ServerError(RuntimeError):
    """A server that does not come up, or went down."""


@dataclass(frozen=True, kw_only=True)
class Server:
    """A server to run."""

    name: str
    command: tuple[str, ...]
    log: Path
    health: str = ""
    """Address that answers 200 when it is ready."""
    says: str = ""
    """Or what its log says then."""
    address: str = ""
    """What people open."""
    env: Mapping[str, str] = field(default_factory=dict)
    alone_s: float = 0.0
    """Seconds that its first process has, when it is asked to stop, to stop the others."""

    def is_ready(self) -> bool:
        """Whether it can be used."""
        if self.says:
            return self.says in self.log.read_text(encoding="utf-8", errors="replace")
        with contextlib.suppress(requests.RequestException):
            return requests.get(self.health, timeout=15).ok
        return False


def prefect_server(root: Path, port: int) -> Server:
    """The Prefect server, with its interface told which port it is on (it calls 4200 otherwise)."""
    api = f"http://{HOST}:{port}/api"
    guards = guarded_server(root, _origins(port))
    return Server(
        name="Prefect",
        command=(sys.executable, "-m", "prefect", "server", "start", "--host", HOST, "--port", str(port)),
        health=f"{api}/health",
        address=f"http://{HOST}:{port}",
        log=prefect_home(root) / "prefect-server.log",
        env={
            "PREFECT_API_URL": api,
            "PREFECT_UI_API_URL": api,
            "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
            **guards,
        },
    )


def _origins(port: int) -> tuple[str, ...]:
    return tuple(f"http://{host}:{port}" for host in (HOST, "localhost"))


def mlflow_server(root: Path, port: int, address: str) -> Server:
    """The MLflow server over the sqlite database at `address`: one worker, no job runner."""
    connect(address)  # set up by one process alone
    folder = prefect_home(root)
    return Server(
        name="MLflow",
        command=(
            *(sys.executable, "-m", "mlflow", "server", "--backend-store-uri", address),
            *("--artifacts-destination", artifact_folder(address) or str(root / "mlartifacts")),
            *("--host", HOST, "--port", str(port), "--workers", "1"),
            *("--allowed-hosts", ",".join(origin.removeprefix("http://") for origin in _origins(port))),
            *("--cors-allowed-origins", ",".join(_origins(port))),
        ),
        health=f"http://{HOST}:{port}/health",
        address=f"http://{HOST}:{port}",
        log=folder / "mlflow-server.log",
        env={"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
    )


def deployments_server(root: Path, prefect: Mapping[str, str]) -> Server:
    """The process that runs the deployments of prefect.yaml.

    Args:
        root: folder of params.yaml.
        prefect: environment of a client of the Prefect server to use.
    """
    return Server(
        name="The process that serves deployments",
        command=(sys.executable, "-m", "pipelines.retrain", "--serve"),
        says=SERVING,
        log=prefect_home(root) / "deployments.log",
        env=prefect,
        alone_s=40.0,  # it stops a run at work, which stops its stage: at most 30 s
    )


def choose_port(default: int, variable: str) -> int:
    """The port that `variable` asks for, else the default, else any free one.

    Raises:
        ServerError: the port asked for is taken, or not a number.
    """
    asked = os.environ.get(variable)
    if asked:
        if not asked.isdigit():
            raise ServerError(f"{variable}={asked}: expected a port number.")
        if not is_free(int(asked)):
            raise ServerError(f"{variable}={asked}: another program listens on that port. Choose another one.")
        return int(asked)
    return default if is_free(default) else free_port()


def is_free(port: int) -> bool:
    """Whether nobody listens on a port of the loopback interface."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((HOST, port))
        except OSError:
            return False
    return True


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind((HOST, 0))
        return listener.getsockname()[1]


@contextlib.contextmanager
def running(*servers: Server, root: Path, timeout_s: float = START_TIMEOUT_S) -> Iterator[list[subprocess.Popen[str]]]:
    """Run servers until the block ends, whatever ends it; the block begins when all of them answer.

    Raises:
        ServerError: one does not come up; with the end of its log.
    """
    processes: list[subprocess.Popen[str]] = []
    try:
        for server in servers:
            server.log.parent.mkdir(parents=True, exist_ok=True)
            with server.log.open("w", encoding="utf-8") as log:
                processes.append(start(server.command, cwd=root, env=server.env, output=log))
        for server, process in zip(servers, processes, strict=True):
            wait_healthy(server, process, timeout_s)
        yield processes
    finally:
        for server, process in zip(servers, processes, strict=False):  # all at once, then wait for each
            with contextlib.suppress(ProcessLookupError):
                (os.kill if server.alone_s else os.killpg)(process.pid, signal.SIGTERM)
        for server, process in zip(servers, processes, strict=False):
            if server.alone_s:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(server.alone_s)
            stop_group(process, _STOP)


def wait_healthy(server: Server, process: subprocess.Popen[str], timeout_s: float) -> None:
    """Wait until a server answers.

    Raises:
        ServerError: it ended, or did not answer in time; with the end of its log.
    """
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        # The process as well: on a taken port the server dies while another one answers.
        if process.poll() is not None:
            break
        if server.is_ready() and process.poll() is None:
            return
        time.sleep(0.2)
    state = "did not answer" if process.poll() is None else f"exited with {process.returncode}"
    tail = " | ".join(server.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-3:])
    place = f"{server.name} on {server.address}" if server.address else server.name
    raise ServerError(f"{place} {state}; {server.log} ends: {tail}")


def watch(
    servers: list[Server],
    processes: list[subprocess.Popen[str]],
    look: Callable[[], object] = lambda: None,
    every_s: float = 15.0,
) -> None:
    """Return never; raise when a server ends by itself. `look` is called now and then; it may fail."""
    looked = time.monotonic()
    while True:
        if time.monotonic() - looked >= every_s:
            try:
                look()
            except Exception as err:  # the pages are worth more
                print(without_credentials(f"ui: a killed retraining could not be marked: {err}"), file=sys.stderr)
            looked = time.monotonic()
        for server, process in zip(servers, processes, strict=True):
            if process.poll() is not None:
                raise ServerError(f"{server.name} ended with {process.returncode}; its log is {server.log}.")
        time.sleep(0.5)


def landing_page(config: Config, address: str) -> str | None:
    """The runs of the project's experiment; None before there is one. MLflow's own start page is about chatbots."""
    with contextlib.suppress(OSError, MlflowException):  # a server elsewhere that is down now
        client = connect(address)
        if found := client.get_experiment_by_name(config.registry.experiment):
            for name in EXPERIMENT_TAGS.keys() - found.tags.keys():  # one of before
                client.set_experiment_tag(found.experiment_id, name, EXPERIMENT_TAGS[name])
            return experiment_url(address, found.experiment_id)
    return None


def _interrupt(*_: int | FrameType | None) -> None:
    for number in _SIGNALS:  # the second Ctrl-C must not break off the clearing up
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def serve_pages(root: Path) -> None:
    """Bring all up, print where they are, and wait for a signal.

    Raises:
        ClaimedError: they are up already.
    """
    config = load_params(root / "params.yaml")
    address = tracking_address(config, root)
    with claimed(prefect_home(root) / "ui.lock", "`make ui` of this project"), contextlib.ExitStack() as stack:
        servers, pages, client = [], Pages(prefect=os.environ.get("PREFECT_API_URL", ""), mlflow=address), {}
        last = read_pages(root)
        if not pages.prefect:
            servers.append(prefect_server(root, choose_port(_port(last.prefect, 4200), "PREFECT_SERVER_API_PORT")))
            client = {name: servers[0].env[name] for name in ("PREFECT_API_URL", "PREFECT_API_AUTH_STRING")}
            pages = replace(pages, prefect=servers[0].address)
        if not address.startswith("http"):
            servers.append(mlflow_server(root, choose_port(_port(last.mlflow, 5000), "MLFLOW_PORT"), address))
            pages = replace(pages, mlflow=servers[-1].address)
        processes = list(stack.enter_context(running(*servers, root=root)))
        note = address_note(root)  # `make retrain` shows itself in this server
        stack.callback(note.unlink, missing_ok=True)
        note.write_text(f"{pages.prefect.removesuffix('/api')}/api\n", encoding="utf-8")
        write_pages(root, pages)
        serving = deployments_server(root, client)
        processes += stack.enter_context(running(serving, root=root))  # stopped first, so that its states are kept
        # MLflow's addresses are all behind a #: nothing is to be cut off the one that has been made here.
        runs = landing_page(config, address) or without_credentials(pages.mlflow)
        print(f"Prefect  {without_credentials(pages.prefect)}\nMLflow   {runs}", flush=True)
        if token := next((server.env[TOKEN] for server in servers if TOKEN in server.env), None):
            print(f"Prefect's page asks once for a password: {token}", flush=True)
        print(f"{_last_line(serving.log, SERVING)}\nCtrl-C stops all of it.", flush=True)
        watch([*servers, serving], processes, lambda: clear_if_killed(root))


def _port(address: str, default: int) -> int:
    """The port of a page on loopback; the default of another one."""
    parts = urlsplit(address)
    return parts.port if parts.hostname == HOST and parts.port else default


def _last_line(log: Path, beginning: str) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return next((line for line in reversed(lines) if line.startswith(beginning)), "")


def main() -> int:
    """Run until a signal; 1 when a server fails, 0 where another `make ui` has all of them up."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    for number in _SIGNALS:  # a shell's `&` starts its children with SIGINT off
        signal.signal(number, _interrupt)
    try:
        serve_pages(project_root())
    except KeyboardInterrupt:
        print("Stopped.", flush=True)
    except ClaimedError as err:
        pages = read_pages(project_root())
        print(without_credentials(f"{err}\nPrefect  {pages.prefect}\nMLflow   {pages.mlflow}"), flush=True)
    except (ServerError, ValueError, OSError) as err:
        print(without_credentials(f"ui: {err}"), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
