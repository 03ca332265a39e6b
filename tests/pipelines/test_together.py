"""Two at once of what has no stage of its own: `dvc repro` and `make ui`."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import requests
from toy_stages import dvc, make_toy, wait_for

from pipelines import processes


@pytest.mark.slow
def test_of_two_dvc_repro_the_second_says_who_is_there_and_nothing_is_done_twice(project: Path, config: Any) -> None:
    toy = make_toy(project, config)
    (toy / "control/slow").write_text("train")
    first = processes.start([sys.executable, "-m", "dvc", "repro"], cwd=toy)
    try:
        wait_for((toy / "control/pids").is_file)
        second = subprocess.run([sys.executable, "-m", "dvc", "repro"], cwd=toy, capture_output=True, text=True)
        (toy / "control/slow").write_text("")
        output, _ = first.communicate(timeout=120)
    finally:
        processes.stop_group(first)
    assert first.returncode == 0, output
    assert second.returncode != 0 and "busy" in second.stderr and "Traceback" not in second.stderr, second.stderr
    assert "up to date" in dvc(toy, "status")


@pytest.mark.slow
def test_make_ui_twice_gives_each_its_own_ports_and_both_end_at_ctrl_c(project: Path, config: Any) -> None:
    make_toy(project, config)
    command = [sys.executable, "-m", "pipelines.ui"]
    both = [processes.start(command, cwd=project, output=(project / f"{i}.log").open("w")) for i in range(2)]
    try:
        logs = [wait_for(lambda i=i: _log_of(project / f"{i}.log", both[i])) for i in range(2)]
        addresses = [
            line.split()[1] for log in logs for line in log.splitlines() if line.startswith(("Prefect ", "MLf"))
        ]
        assert len(set(addresses)) == 4
        assert all(requests.get(address, timeout=20).status_code < 500 for address in addresses)
        for process in both:
            process.send_signal(signal.SIGINT)
        assert [process.wait(60) for process in both] == [0, 0]
        assert not any(processes.group_members(process.pid) for process in both)
    finally:
        for process in both:
            processes.stop_group(process)


def _log_of(path: Path, process: subprocess.Popen[str]) -> str:
    """What it said, once it is up."""
    said = path.read_text()
    assert process.poll() is None, said
    return said if "Ctrl-C stops all of it." in said else ""
