"""The files that others start from: what can be held against this project and its tools without a cloud."""

from __future__ import annotations

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import mlflow
import pytest
import requests
import yaml
from mlflow import MlflowClient

from cigpose.config import load_params, load_preset

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINNED = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M))
DOCKERFILE = (ROOT / "Dockerfile").read_text()
COMPOSE = yaml.safe_load((ROOT / "compose.yaml").read_text())
KUBERAY = yaml.safe_load((ROOT / "deploy/kuberay.yaml").read_text())
SKYPILOT = yaml.safe_load((ROOT / "deploy/skypilot.yaml").read_text())
IMAGE = f"cigpose-pipelines:{PROJECT['version']}"


def of_key(value: Any, wanted: str) -> Iterator[Any]:
    """Every value of a key, wherever it stands."""
    if isinstance(value, dict):
        yield from ([value[wanted]] if wanted in value else [])
    for child in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from of_key(child, wanted)


def test_the_image_takes_files_that_are_there_and_extras_that_exist() -> None:
    steps = re.sub(r"\\\n", " ", DOCKERFILE).splitlines()
    copied = [name for step in steps if step.startswith("COPY ") for name in shlex.split(step)[1:-1]]
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    assert copied and sorted(copied) == sorted(allowed)
    assert all((ROOT / name).exists() for name in copied)
    assert PROJECT["readme"] in copied and set(PROJECT["license-files"]) <= set(copied)
    extras = re.search(r"'\.\[([\w,]+)\]'", DOCKERFILE)
    assert extras and set(extras.group(1).split(",")) <= PROJECT["optional-dependencies"].keys()
    [base] = [step.split()[1] for step in steps if step.startswith("FROM ")]
    assert re.fullmatch(r"python:3\.\d+\.\d+-slim-bookworm", base)
    assert re.search(r"^USER (?!root)", DOCKERFILE, re.M)


@pytest.mark.parametrize("device, expected", [("cpu", "--index-url"), ("cuda", ""), ("tpu", None)])
def test_the_image_takes_the_torch_of_its_build_argument(tmp_path: Path, device: str, expected: str | None) -> None:
    [step] = [s for s in re.sub(r"\\\n", " ", DOCKERFILE).splitlines() if s.startswith("RUN case")]
    (tmp_path / "pip").write_text('#!/bin/sh\necho "pip $*"\n')
    (tmp_path / "pip").chmod(0o755)
    environment = {"DEVICE": device, "CPU_WHEELS": "https://host/cpu", "PATH": f"{tmp_path}:/usr/bin:/bin"}
    command = ["sh", "-ec", step.removeprefix("RUN ")]
    answer = subprocess.run(command, env=environment, capture_output=True, text=True)
    if expected is None:
        assert answer.returncode == 1 and answer.stderr == f"DEVICE={device}: expected cuda or cpu\n"
    else:
        words = answer.stdout.split()
        assert words[0] == "pip" and words[-1] == "torch" and ("--index-url" in words) == bool(expected)


def test_images_are_pinned_and_ours_is_of_this_version() -> None:
    images = {*of_key(KUBERAY, "image"), *of_key(COMPOSE, "image")}
    assert {image for image in images if image.startswith("cigpose-pipelines")} == {IMAGE, f"{IMAGE}-cpu"}
    for image in images:
        assert re.search(r":.*\d", image) and "latest" not in image, image


def test_nothing_that_is_deployed_holds_a_secret_or_listens_to_others() -> None:
    for service in COMPOSE["services"].values():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ()))
    for environment in of_key(COMPOSE, "environment"):
        for name, value in environment.items():
            if re.search("PASSWORD|SECRET|AUTH|KEY|USER$|://", f"{name} {value}") and name not in (
                *("POSTGRES_USER", "AWS_ENDPOINT_URL", "PREFECT_UI_API_URL"),
            ):
                assert re.search(r"\$\{\w+:\?set it in \.env\}", value), f"{name}: {value}"
    assert set(SKYPILOT["secrets"].values()) == {None}
    assert not list(of_key(KUBERAY, "env")), "from the secret and the operator alone"
    assert "env" not in {line.strip("/") for line in (ROOT / ".dockerignore").read_text().splitlines()}


def test_parts_of_the_servers_that_refer_to_each_other_exist() -> None:
    services = COMPOSE["services"]
    for name, service in services.items():
        assert service.get("depends_on", {}).keys() <= services.keys(), name
        assert {use["source"] for use in service.get("configs", ())} <= COMPOSE["configs"].keys()
        named = {volume.split(":")[0] for volume in service.get("volumes", ())}
        assert named <= COMPOSE["volumes"].keys()
    urls = [str(value) for env in of_key(COMPOSE, "environment") for value in env.values() if "@postgres" in str(value)]
    databases = {url.rpartition("/")[2] for url in urls}
    assert databases == set(re.findall(r"CREATE DATABASE (\w+);", COMPOSE["configs"]["databases"]["content"]))


def test_the_ray_job_fits_the_versions_and_stages_of_this_project() -> None:
    spec = KUBERAY["spec"]
    cluster = spec["rayClusterSpec"]
    assert (KUBERAY["apiVersion"], KUBERAY["kind"], cluster["rayVersion"]) == ("ray.io/v1", "RayJob", PINNED["ray"])
    assert cluster["authOptions"] == {"mode": "token"} and cluster["enableInTreeAutoscaling"] is True
    words = shlex.split(spec["entrypoint"])
    assert words[:2] == ["bash", "-ec"] and subprocess.run(["bash", "-n", "-c", words[2]]).returncode == 0
    stages = re.findall(r"python -m pipelines\.(\w+)", words[2])
    assert stages == ["download", "train", "evaluate", "register"]
    assert all((ROOT / f"pipelines/{stage}.py").is_file() for stage in stages)
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for group in groups:
        pod = group["template"]["spec"]
        volumes = {volume["name"] for volume in pod["volumes"]}
        for container in pod["containers"]:
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
    [gpus] = cluster["workerGroupSpecs"]
    limits = gpus["template"]["spec"]["containers"][0]["resources"]["limits"]
    written = re.search(r"num_workers: (\d+), threads_per_worker: (\d+)", (ROOT / "deploy/kuberay.yaml").read_text())
    assert written and int(written[1]) == gpus["maxReplicas"] * int(limits["nvidia.com/gpu"])
    cpus = int(gpus["template"]["spec"]["containers"][0]["resources"]["requests"]["cpu"])
    assert int(written[2]) * int(limits["nvidia.com/gpu"]) <= cpus


@pytest.fixture
def sky_node(tmp_path: Path) -> Callable[..., tuple[int, str, list[str]]]:
    """Run the task as one of its nodes: exit status, output, and what was called in place of Ray and the stages."""
    programs, called = tmp_path / "venv/bin", tmp_path / "called"
    programs.mkdir(parents=True)
    scripts = {
        "ray": 'echo "ray $*" >> "$HOME/called"',
        "python": f'case "$*" in -m*) echo "$* $RAY_ADDRESS" >> "$HOME/called";; *) exec {sys.executable} "$@";; esac',
        "cigpose": f'exec {sys.executable} -c "from cigpose.cli.main import main; main()" "$@"',
    }
    for name, script in scripts.items():
        (programs / name).write_text(f"#!/bin/bash\n{script}\n")
        (programs / name).chmod(0o755)

    def run(rank: int, **environment: str) -> tuple[int, str, list[str]]:
        given = {name: value for name, value in SKYPILOT["envs"].items() if value is not None}
        sky = {"SKYPILOT_NODE_RANK": str(rank), "SKYPILOT_NUM_GPUS_PER_NODE": "8", "HOME": str(tmp_path)}
        env = {**os.environ, **given, **sky, "PYTHONPATH": str(ROOT), **environment}
        answer = subprocess.run(["bash", "-c", SKYPILOT["run"]], env=env, capture_output=True, text=True, timeout=60)
        return answer.returncode, answer.stdout + answer.stderr, called.read_text().splitlines()

    return run


def test_the_first_spot_node_trains_what_lies_at_the_bucket(sky_node: Any, tmp_path: Path) -> None:
    nodes = "127.77.0.1\n127.77.0.2"
    code, output, called = sky_node(0, BUCKET="s3://mine/", SKYPILOT_NODE_IPS=nodes)
    assert code == 0, output
    assert called[0] == "ray start --head --port 6379 --include-dashboard=false"
    asked = [
        f"-m pipelines.{stage} 127.77.0.1:6379" for stage in ("download pretrained", "train", "evaluate", "register")
    ]
    assert called[1:] == asked
    config, preset = load_params(tmp_path / "project/params.yaml"), load_preset(SKYPILOT["envs"]["PRESET"])
    assert config.train.checkpoint.address == f"s3://mine/runs/{preset.name}"
    assert config.data.locations == {name: f"s3://mine/shards/{name}" for name in {*preset.data.train, preset.data.val}}
    assert (config.train.cluster.num_workers, config.train.cluster.use_gpu) == (16, True)
    assert config.train.optimizer == preset.train.optimizer and config.model == preset.model


def test_other_spot_nodes_join_the_first_when_it_listens(sky_node: Any) -> None:
    with socket.socket() as head:
        head.bind(("127.77.0.1", 6379))
        threading.Timer(0.5, head.listen).start()
        code, output, called = sky_node(1, SKYPILOT_NODE_IPS="127.77.0.1\n127.77.0.2")
    assert code == 0, output
    assert called == ["ray start --address 127.77.0.1:6379 --block"]


def test_the_spot_task_says_how_it_goes_on() -> None:
    resources = SKYPILOT["resources"]
    assert resources["use_spot"] is True and resources["job_recovery"]["strategy"] == "EAGER_NEXT_REGION"
    assert SKYPILOT.keys() <= {"name", "workdir", "num_nodes", "resources", "envs", "secrets", "setup", "run"}
    assert subprocess.run(["bash", "-n", "-c", SKYPILOT["setup"]]).returncode == 0


def free_port() -> int:
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@contextmanager
def served(name: str, health: str, replaced: dict[str, str], log: Path) -> Iterator[str]:
    """Address of a service of compose.yaml, run by its own command in its own environment, with other addresses."""
    service, port = COMPOSE["services"][name], free_port()
    own = service["ports"][0].rpartition(":")[2]
    text = yaml.safe_dump({"command": service["command"], "environment": service["environment"]}, width=1000)
    for pattern, value in {"0.0.0.0": "127.0.0.1", rf"\b{own}\b": str(port), **replaced}.items():
        text = re.sub(pattern, value, text)
    asked = yaml.safe_load(text)
    with log.open("wb") as output:
        command = [sys.executable, "-m", *asked["command"]]
        environment = {**os.environ, **asked["environment"], "PREFECT_HOME": str(log.parent / "prefect")}
        process = subprocess.Popen(
            command, env=environment, cwd=log.parent, stdout=output, stderr=output, start_new_session=True
        )
    try:
        address, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 240
        while not _answers(address + health):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.2)
        yield address
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)


def _answers(address: str) -> bool:
    try:
        return requests.get(address, timeout=5).status_code == 200
    except requests.RequestException:
        return False


@pytest.mark.slow
def test_mlflow_on_postgres_with_files_on_s3_registers_two_versions_at_once(
    postgres: Any, s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3.create_bucket(Bucket="mlflow")
    replaced = {
        r"postgresql://.*/mlflow": postgres.make_database("mlflow"),
        "http://store:9000": os.environ["AWS_ENDPOINT_URL"],
        r"\$\{AWS_\w+:\?set it in \.env\}": "test",
        r"'2'": "'1'",  # one worker of the server's, which is enough here
    }
    with served("mlflow", "/health", replaced, tmp_path / "mlflow.log") as address:
        monkeypatch.setattr(mlflow.tracking._tracking_service.utils, "_tracking_uri", None)
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")  # its first upload is slow: it imports boto3
        client = MlflowClient(tracking_uri=address, registry_uri=address)
        experiment = client.create_experiment("people")
        client.create_registered_model("model")

        def register(number: int) -> tuple[int, str]:
            mine = MlflowClient(tracking_uri=address, registry_uri=address)
            run = mine.create_run(experiment).info.run_id
            mine.log_text(run, f"weights {number}", "model/weights.txt")
            version = mine.create_model_version("model", f"runs:/{run}/model", run_id=run)
            return int(version.version), run

        with ThreadPoolExecutor(2) as both:
            found = dict(both.map(register, range(2)))
        assert sorted(found) == [1, 2] and len(set(found.values())) == 2
        kept = {entry["Key"] for entry in s3.list_objects_v2(Bucket="mlflow")["Contents"]}
        assert {f"{experiment}/{run}/artifacts/model/weights.txt" for run in found.values()} <= kept
    assert sorted(postgres.run("mlflow", "SELECT version FROM model_versions").split()) == ["1", "2"]


@pytest.mark.slow
def test_prefect_on_postgres_keeps_the_runs_of_two_clients_and_lets_nobody_in_without_the_password(
    postgres: Any, tmp_path: Path
) -> None:
    replaced = {
        r"postgresql\+asyncpg://.*/prefect": postgres.make_database("prefect").replace("://", "+asyncpg://"),
        r"\$\{PREFECT_AUTH_STRING:\?set it in \.env\}": "admin:of-the-tests",
    }
    with served("prefect", "/api/health", replaced, tmp_path / "prefect.log") as address:
        flows = f"{address}/api/flows/"
        assert requests.post(flows, json={"name": "retrain"}, timeout=30).status_code == 401

        def start_run(number: int) -> str:
            with requests.Session() as client:
                client.auth = ("admin", "of-the-tests")
                flow = client.post(flows, json={"name": "retrain"}, timeout=30).json()["id"]
                run = {"name": f"run-{number}", "flow_id": flow, "state": {"type": "RUNNING"}}
                answer = client.post(f"{address}/api/flow_runs/", json=run, timeout=30)
            assert answer.status_code == 201, answer.text
            return str(answer.json()["id"])

        with ThreadPoolExecutor(2) as both:
            runs = set(both.map(start_run, range(2)))
    kept = postgres.run("prefect", "SELECT r.id, f.name, r.state_type FROM flow_run r JOIN flow f ON r.flow_id = f.id")
    assert sorted(kept.split()) == sorted(f"{run}|retrain|RUNNING" for run in runs)
