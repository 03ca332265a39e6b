"""What a run wants MLflow to know, on disk first.

A training must neither stop nor wait for a tracking server. So each record is appended to `tracking.jsonl` in the run's
folder, and `pipelines.tracking.delivery` carries the records to MLflow in their order when it can:

    <run folder>/tracking.jsonl   every record since the run began, one JSON object a line
    <run folder>/tracking.json    the run's ids, and how many bytes of tracking.jsonl MLflow has
    <run folder>/outbox/          copies of files not yet uploaded
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import logging
import shutil
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from cigpose.files.atomic import write_text

log = logging.getLogger(__name__)

LOCAL = "local-"
"""Start of the id of a run that MLflow does not know yet."""


class Spool:
    """The records of one run, and the position up to which they are delivered.

    One process at a time owns it (`acquire`); inside that process one thread may append while another delivers.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self.records_path = self.folder / "tracking.jsonl"
        self.state_path = self.folder / "tracking.json"
        self._lock = threading.Lock()
        self._owner: IO[str] | None = None
        self._told: set[int] = set()
        self._numbers = itertools.count(time.time_ns())
        self.state: dict[str, Any] = {"local_id": LOCAL + uuid.uuid4().hex, "run_id": None, "address": None, "sent": 0}
        self.state["former_ids"] = []
        self.reload()

    @staticmethod
    def exists(folder: Path) -> bool:
        """Whether a run was ever tracked in this folder."""
        return (folder / "tracking.json").is_file()

    def reload(self) -> None:
        """Read the state that the last owner left; one that a full disk or a power cut spoilt is none."""
        if not self.state_path.is_file():
            return
        try:
            state = json.loads(self.state_path.read_text(encoding="utf-8"))
            if not isinstance(state, dict):
                raise ValueError(f"{state!r} is no JSON object")
            self.state |= state
        except ValueError as err:
            log.warning("%s: not readable (%s). If this run goes on, MLflow gets all of it anew.", self.state_path, err)

    def acquire(self, timeout_s: float = 0.0) -> bool:
        """Become the owner; False when another process still is after `timeout_s`.

        The lock is a POSIX record lock: it dies with its process and is not inherited by forked loaders.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        file = (self.folder / "tracking.lock").open("w")
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                if time.monotonic() >= deadline:
                    file.close()
                    return False
                time.sleep(0.1)
            else:
                break
        self._owner = file
        self.reload()
        self._cut_half_line()
        return True

    def release(self) -> None:
        """Let another process own it."""
        if self._owner is not None:
            self._owner.close()
            self._owner = None

    def _cut_half_line(self) -> None:
        """Remove what a killed process, or a full disk, did not finish at the end."""
        if not self.records_path.is_file():
            return
        with self.records_path.open("r+b") as file:
            content = file.read()
            whole = content.rfind(b"\n") + 1
            while whole and _parse(content[content.rfind(b"\n", 0, whole - 1) + 1 : whole]) is None:
                whole = content.rfind(b"\n", 0, whole - 1) + 1
            if whole < len(content):
                file.truncate(whole)

    def append(self, record: dict[str, Any]) -> None:
        """Keep a record, whole or not at all; it outlives the process, not a power cut in the same second.

        Raises:
            OSError: the disk is full.
        """
        line = json.dumps({**record, "time": record.get("time", time.time_ns() // 1_000_000)}) + "\n"
        with self._lock, self.records_path.open("ab", buffering=0) as file:
            start, rest = file.tell(), line.encode()
            try:
                while rest:
                    rest = rest[file.write(rest) :]
            except OSError:
                file.truncate(start)
                raise

    def keep_copy(self, path: Path) -> str:
        """Copy a file or folder to the outbox, since the original may change before it is uploaded.

        Returns: its place relative to the run's folder.
        """
        place, target = self._new_place(path.name)
        if path.is_dir():
            shutil.copytree(path, target)
        else:
            shutil.copyfile(path, target)
        return place

    def keep_text(self, text: str, name: str) -> str:
        """Keep a text in the outbox as file `name`.

        Returns: its place relative to the run's folder.
        """
        place, target = self._new_place(name)
        target.write_text(text, encoding="utf-8")
        return place

    def _new_place(self, name: str) -> tuple[str, Path]:
        place = f"outbox/{next(self._numbers)}/{name}"
        target = self.folder / place
        target.parent.mkdir(parents=True)
        return place, target

    def drop_copy(self, place: str) -> None:
        """Remove a copy made by `keep_copy`; its upload is done."""
        shutil.rmtree((self.folder / place).parent, ignore_errors=True)
        with contextlib.suppress(OSError):
            (self.folder / "outbox").rmdir()

    def records(self, start: int = 0) -> Iterator[tuple[int, dict[str, Any]]]:
        """Records from byte `start` on, each with the position after it."""
        if not self.records_path.is_file():
            return
        with self.records_path.open("rb") as file:
            file.seek(start)
            position = start
            for line in file:
                if not line.endswith(b"\n"):
                    return
                position += len(line)
                if (record := _parse(line)) is not None:
                    yield position, record
                elif position not in self._told:
                    self._told.add(position)
                    log.warning(
                        "%s: the line that ends at byte %d is broken, expected a JSON object; MLflow gets the others.",
                        self.records_path,
                        position,
                    )

    def pending(self) -> int:
        """Bytes not yet delivered."""
        size = self.records_path.stat().st_size if self.records_path.is_file() else 0
        return max(0, size - self.state["sent"])

    def last_steps(self) -> dict[str, int]:
        """The last step at which each metric was recorded."""
        steps: dict[str, int] = {}
        for _, record in self.records():
            if record["do"] == "metrics":
                steps |= dict.fromkeys(record["values"], record["step"])
        return steps

    def is_known_as(self, run_id: str) -> bool:
        """Whether the run has, or had, this id."""
        return run_id in (self.state["run_id"], self.state["local_id"], *self.state["former_ids"])

    def start_over(self, **state: Any) -> None:
        """Forget that anything was delivered: the next delivery makes a new run of the whole history."""
        former = [*self.state["former_ids"], *filter(None, [self.state["run_id"]])]
        self.update(run_id=None, sent=0, former_ids=former, **state)

    def update(self, **state: Any) -> None:
        """Change the state, on disk at once."""
        self.state |= state
        write_text(self.state_path, json.dumps(self.state))


def _parse(line: bytes) -> dict[str, Any] | None:
    """The record in a line; None for a broken one."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and "do" in record else None
