"""One retraining per project, and what becomes of one that was killed.

`.runs/retrain.lock` is held by the process of a retraining, on whichever machine; the kernel frees a dead one's.
`.runs/retrain.json` names its flow run and the process group of its stage. Found without an owner, it is of a killed
retraining: its stage is stopped and its flow run, which Prefect goes on to call running, is marked.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import psutil

from cigpose.files.atomic import ClaimedError, claimed, clear_leftovers, write_json
from pipelines.access import using_server
from pipelines.paths import RUNS
from pipelines.processes import end_group, group_members
from pipelines.retraining.workspace import FOLDER

LOCK, NOTE = RUNS / "retrain.lock", RUNS / "retrain.json"
KILLED = "Killed"
"""Name of the state of a flow run whose process is gone."""


@contextlib.contextmanager
def only_retraining(root: Path) -> Iterator[None]:
    """Be the only retraining of a project.

    Raises:
        ClaimedError: there is another one; says which process it is, and since when.
    """
    with claimed(root / LOCK, "A retraining of this project"):
        yield


@contextlib.contextmanager
def noted(root: Path, flow_run: str) -> Iterator[Note]:
    """Leave a note of this flow run while the block lasts; only a kill leaves it behind."""
    note = Note(root / NOTE, {"flow_run": flow_run, "host": os.uname().nodename, "group": None})
    clear_leftovers(note.path)
    note.write()
    try:
        yield note
    finally:
        note.path.unlink(missing_ok=True)


class Note:
    """Who retrains."""

    def __init__(self, path: Path, facts: dict[str, Any]) -> None:
        self.path, self._facts = path, facts

    def write(self, group: int | None = None) -> None:
        """Name the process group of the stage at work."""
        write_json(self.path, self._facts | {"group": group})


def clear_killed(root: Path) -> str | None:
    """Stop what a killed retraining has left running, and mark its flow run; the caller holds the project's claim.

    Prefect is asked as its settings say. Where it does not know the run, nothing is to be marked.

    Returns: id of the flow run that was marked.
    """
    path = root / NOTE
    if not path.is_file():
        return None
    marked = None
    with contextlib.suppress(ValueError, KeyError, TypeError):
        note = json.loads(path.read_text(encoding="utf-8"))
        if note["host"] == os.uname().nodename and note["group"] and _is_ours(note["group"], root / FOLDER):
            end_group(note["group"])
        marked = _mark(UUID(note["flow_run"]))
    path.unlink(missing_ok=True)
    return marked


def clear_if_killed(root: Path) -> str | None:
    """`clear_killed`, if there is a note and nobody retrains; on the project's server."""
    if (root / NOTE).is_file():
        with contextlib.suppress(ClaimedError), only_retraining(root), using_server(root):
            return clear_killed(root)
    return None


def _is_ours(group: int, workspace: Path) -> bool:
    """Whether a process of the group works in the workspace; a number may be another group's by now."""
    for pid in group_members(group):
        with contextlib.suppress(psutil.Error):
            if Path(psutil.Process(pid).cwd()).is_relative_to(workspace.resolve()):
                return True
    return False


def _mark(flow_run: UUID) -> str | None:
    from prefect.client.orchestration import get_client  # late: `make ui` looks often and finds nothing
    from prefect.exceptions import ObjectNotFound
    from prefect.states import Crashed

    with get_client(sync_client=True) as client:
        try:
            state = client.read_flow_run(flow_run).state
        except ObjectNotFound:
            return None
        if state is not None and state.is_final():
            return None
        message = "Its process is gone: killed, or the machine went down. The next run goes on where it stopped."
        client.set_flow_run_state(flow_run, Crashed(name=KILLED, message=message), force=True)
    return str(flow_run)
