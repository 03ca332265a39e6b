"""Child processes that are seen while they run and leave nothing behind when they are stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO

import psutil

Grace = tuple[tuple[signal.Signals, float], ...]
GRACE: Grace = ((signal.SIGINT, 15.0), (signal.SIGTERM, 5.0), (signal.SIGKILL, 5.0))
"""How a group is asked to stop, and the seconds until it is asked more firmly. Together less than the 30 s that Prefect
gives a cancelled flow."""


def environment(changes: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of a child: ours, with this interpreter's commands first and output unbuffered."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    return {**os.environ, "PATH": path, "PYTHONUNBUFFERED": "1", **(changes or {})}


def start(
    command: Sequence[str], *, cwd: Path, env: Mapping[str, str] | None = None, output: int | IO[str] = subprocess.PIPE
) -> subprocess.Popen[str]:
    """Start a command in a process group of its own, stdout and stderr together."""
    return subprocess.Popen(
        command,
        cwd=cwd,
        env=environment(env),
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )


def run_logged(
    command: Sequence[str],
    *,
    cwd: Path,
    on_line: Callable[[str], None],
    env: Mapping[str, str] | None = None,
    grace: Grace = GRACE,
    on_start: Callable[[int], None] = lambda group: None,
) -> int:
    """Run a command and hand on each line of its output at once.

    Whatever interrupts it (Ctrl-C, a cancelled flow, a timeout), the whole group is stopped before this returns.
    `on_start` hears the group's number.

    Returns: its exit status.
    """
    process = start(command, cwd=cwd, env=env)
    assert process.stdout is not None
    try:
        on_start(process.pid)
        for line in process.stdout:
            if line.strip():
                on_line(line.rstrip())
        return process.wait()
    except BaseException:
        stop_group(process, grace)
        raise


def stop_group(process: subprocess.Popen[str], grace: Grace = GRACE) -> None:
    """End a process started by `start` and everything in its group."""
    end_group(process.pid, grace, bury=process.poll)


def end_group(group: int, grace: Grace = GRACE, bury: Callable[[], object] = lambda: None) -> None:
    """End every process of a group.

    The group is watched, not its first process alone: on SIGTERM dvc dies at once while the stage it started lives on.

    Args:
        group: its number.
        grace: how it is asked.
        bury: called again and again; waits for a child of ours that has ended.
    """
    for number, seconds in grace:
        bury()
        if not group_members(group):
            return
        try:
            os.killpg(group, number)
        except ProcessLookupError:
            return
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            bury()
            if not group_members(group):
                return
            time.sleep(0.05)


def group_members(group: int) -> list[int]:
    """Ids of the living processes of a group; zombies, which a container may never bury, do not count."""
    members = []
    for process in psutil.process_iter(["status"]):
        try:
            if os.getpgid(process.pid) == group and process.info["status"] != psutil.STATUS_ZOMBIE:
                members.append(process.pid)
        except OSError:
            continue
    return members
