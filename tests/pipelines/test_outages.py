"""A retraining beside servers that go away and a disk that is full: it recovers, or stops cleanly."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import yaml
from toy_stages import dvc, git, make_toy, tree, wait_for

from cigpose.config import Config, config_from_mapping
from pipelines import processes, ui

ASKED = os.environ.get("CIGPOSE_OUTAGES")
PUBLISHED = "/download.openmmlab.com/mmpose/datasets/crowdpose_annotations.tar"
IMPATIENT = """
import sys
from dataclasses import replace
from pipelines import retrain
for name, policy in retrain.POLICIES.items():
    retrain.POLICIES[name] = replace(policy, retry_delay_s=min(policy.retry_delay_s, 1))
sys.exit(retrain.main())
"""
"""The flow, with a second between two tries of a stage in place of a minute."""
REGISTER = """
import sys
from pathlib import Path
from pipelines.tracking.address import UnreachableError, connect
try:
    connect(sys.argv[1])
except UnreachableError as err:
    sys.exit(f"register: {err}")
Path("data").mkdir(exist_ok=True)
Path("data/registered.json").write_text('{"decision_text": "toy: version 3 is the new champion."}')
"""


def a_tar() -> bytes:
    with io.BytesIO() as buffer:
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            member = tarfile.TarInfo("annotations.json")
            member.size = 2
            tar.addfile(member, io.BytesIO(b"{}"))
        return buffer.getvalue()


@pytest.mark.slow
@pytest.mark.skipif(not ASKED, reason="a minute of servers: set CIGPOSE_OUTAGES=1")
def test_a_retraining_outlives_prefects_restart_an_mlflow_that_is_away_and_a_host_that_fails_three_times(
    project: Path, config: Config, host, act, mlflow_server
) -> None:
    values = config.to_mapping()
    mirror = f"{host.address}/m"
    sources = {"crowdpose": ["crowdpose_annotations.tar"]}
    values["data"]["download"] |= {"sources": sources, "mirror": mirror, "max_attempts": 2, "timeout_s": 5}
    toy = make_toy(project, config_from_mapping(values))
    host.put(f"/m{PUBLISHED}", a_tar(), *(act(status=503) for _ in range(3)))
    use_real_stages(toy, mlflow_server.address)
    mlflow_server.kill()
    before = tree(toy)
    prefect = ui.prefect_server(toy, ui.free_port())
    (toy / "control/slow").write_text("train")
    log = toy / "flow.log"
    with ui.running(prefect, root=toy) as (server,), log.open("w") as output:
        env = {name: prefect.env[name] for name in ("PREFECT_API_URL", "PREFECT_API_AUTH_STRING")}
        flow = processes.start([sys.executable, "-c", IMPATIENT], cwd=toy, env=env, output=output)
        try:
            wait_for(lambda: "waiting" in log.read_text() or flow.poll() is not None)
            os.killpg(server.pid, signal.SIGKILL)  # in the middle of the training
            server.wait()
            with ui.running(prefect, root=toy):
                (toy / "control/slow").write_text("")
                wait_for(lambda: "does not answer" in log.read_text() or flow.poll() is not None)
                mlflow_server.start()
                assert flow.wait(200) == 0, log.read_text()
        finally:
            processes.stop_group(flow)
    said = log.read_text()
    assert said.count("answers 503") >= 3 and "toy: version 3 is the new champion." in said
    (name,) = dvc(toy, "exp", "list", "--name-only").split()
    assert f"`dvc exp apply {name}` takes it." in said and tree(toy) == before
    assert len(host.requests) >= 4


def use_real_stages(toy: Path, mlflow: str) -> None:
    """Let the toy download as the project does, and ask MLflow before it registers."""
    (toy / "register.py").write_text(REGISTER)
    stages = yaml.safe_load((toy / "dvc.yaml").read_text())
    stages["stages"]["download"] = {
        "cmd": "python -m pipelines.download crowdpose",
        "params": ["data.download.sources"],
        "outs": [{"data/raw/crowdpose": {"persist": True, "cache": False}}],
    }
    stages["stages"]["register"]["cmd"] = f"python register.py {mlflow}"
    (toy / "dvc.yaml").write_text(yaml.safe_dump(stages, sort_keys=False))
    subprocess.run(["git", "add", "register.py"], cwd=toy, check=True)


IN_SMALL_DISK = """
set -e
mount -t tmpfs -o size=8m none "$1"
cp -a "$2/." "$1"
cd "$1"
mkdir .runs
free=$(df --output=avail -k . | tail -n 1)
head -c $(((free - 400) * 1024)) /dev/zero > .runs/filler
retrain() {
    if python -m pipelines.retrain > "$2/$1.out" 2> "$2/$1.err"; then echo done; else echo failed; fi > "$2/$1.state"
}
retrain full "$2"
rm .runs/filler
retrain room "$2"
git status --porcelain > "$2/status.out"
dvc exp list --name-only > "$2/experiments.out"
"""


def can_mount() -> bool:
    command = ["unshare", "-rm", "sh", "-c", "mount -t tmpfs none /mnt"]
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(not ASKED or not can_mount(), reason="set CIGPOSE_OUTAGES=1, where one may mount a small disk")
def test_on_a_full_disk_a_retraining_says_so_in_one_sentence_and_goes_on_once_there_is_room(
    project: Path, config: Config
) -> None:
    toy, disk = make_toy(project, config), project.parent / "disk"
    stages = yaml.safe_load((toy / "dvc.yaml").read_text())
    stages["stages"]["train"]["cmd"] = "python -c \"open('data/model', 'wb').write(bytes(1 << 20))\""
    (toy / "dvc.yaml").write_text(yaml.safe_dump(stages, sort_keys=False))
    git(toy, "-c", "user.name=t", "-c", "user.email=t@localhost", "commit", "--quiet", "--all", "-m", "a large model")
    (toy / "mlflow.db").unlink()
    disk.mkdir()
    environment = processes.environment({"PREFECT_HOME": str(project.parent / "home")})
    command = ["unshare", "-rm", "sh", "-c", IN_SMALL_DISK, "sh", str(disk), str(toy)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr
    said = {path.name: path.read_text() for path in toy.glob("*.*") if path.suffix in (".out", ".err", ".state")}
    assert said["full.state"] == "failed\n", said
    (sentence,) = [line for line in said["full.err"].splitlines() if line.startswith("retrain: ")]
    assert sentence == "retrain: train: OSError: [Errno 28] No space left on device"
    assert said["room.state"] == "done\n", said["room.err"]
    assert said["status.out"] == "", "the user's tree is as it was"
    (name,) = said["experiments.out"].split()
    assert said["room.out"] == f"toy: version 3 is the new champion. `dvc exp apply {name}` takes it.\n"
