"""One at a time, among all who use one MLflow: by its own records, so that sqlite, a server and both at once agree.

MLflow offers no lock and no compare-and-swap. Lamport's bakery needs neither: everyone writes one entry of its own, a
tag of the registered model, and reads those of the others. An entry is `{"number": n, "beat": b, "owner": ...}`; number
0 stands for "about to draw a number". The lowest (number, name) has the turn. Entries vanish with the turn; one whose
process is known to be dead, or that shows no beat for `DEAD_AFTER_S`, is removed by whoever waits for it.

Held to by what MLflow must be: one database that reads what was written before (no lagging read replica). A process
that is stopped for longer than `DEAD_AFTER_S` inside its turn loses it; it is told so before it moves an alias
(`Turn.keep`), but not between that question and the move.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

PREFIX = "cigpose.turn."
DEAD_AFTER_S = 30.0
"""Seconds without a beat after which an entry of an unknown process is taken for a dead one's."""
POLL_S = 0.25
WAIT_S = 600.0


class TurnLostError(OSError):
    """The turn was taken away, or never came."""


class Turn:
    """A place in the queue at a registered model."""

    def __init__(self, client: MlflowClient, model: str) -> None:
        self._client, self._model = client, model
        self._name, self._number, self._beat = PREFIX + uuid.uuid4().hex, 0, 0
        self._seen: dict[str, tuple[str, float]] = {}

    def keep(self) -> None:
        """Show that this process lives.

        Raises:
            TurnLostError: others have taken it for dead.
        """
        if self._name not in self._entries():
            raise TurnLostError(
                f"{self._model}: this process was stopped for too long and lost its turn. Run it again."
            )
        self._write()

    def wait(self) -> None:
        """Draw a number and wait for the turn.

        Raises:
            TurnLostError: it does not come within `WAIT_S`.
        """
        self._write()
        self._number = 1 + max((_number(text) for text in self._entries().values()), default=0)
        self.keep()
        deadline = time.monotonic() + WAIT_S
        while before := self._before():
            if time.monotonic() > deadline:
                raise TurnLostError(
                    f"{self._model}: another registration has the turn for {WAIT_S:.0f} s ({before}). Wait until it "
                    "ends, or stop it, and run again."
                )
            time.sleep(POLL_S)
            self.keep()

    def leave(self) -> None:
        """Give the turn, or the place in the queue, back."""
        self._drop(self._name)

    def _before(self) -> str | None:
        """The entry of someone whose turn comes first; those of the dead are removed."""
        for name, text in self._entries().items():
            number = _number(text)
            if name == self._name or (number and (number, name) > (self._number, self._name)):
                continue
            if not self._is_dead(name, text):
                return text
            self._drop(name)
        return None

    def _is_dead(self, name: str, text: str) -> bool:
        now = time.monotonic()
        last, since = self._seen.get(name, (None, now))
        self._seen[name] = (text, since if last == text else now)
        host, _, process = str(_read(text).get("owner", "")).rpartition(" ")
        if host == _host() and process.isdigit() and not os.path.exists(f"/proc/{process}"):
            return True
        return now - self._seen[name][1] > DEAD_AFTER_S

    def _entries(self) -> dict[str, str]:
        tags = self._client.get_registered_model(self._model).tags
        return {name: text for name, text in tags.items() if name.startswith(PREFIX)}

    def _write(self) -> None:
        self._beat += 1
        entry = {"number": self._number, "beat": self._beat, "owner": f"{_host()} {os.getpid()}"}
        self._client.set_registered_model_tag(self._model, self._name, json.dumps(entry))

    def _drop(self, name: str) -> None:
        with suppress(MlflowException):  # gone already
            self._client.delete_registered_model_tag(self._model, name)


@contextmanager
def turn(client: MlflowClient, model: str) -> Iterator[Turn]:
    """Have a registered model to oneself, among all processes that ask in this way.

    Raises:
        TurnLostError: it does not come in time.
    """
    mine = Turn(client, model)
    try:
        mine.wait()
        yield mine
    finally:
        mine.leave()


def _read(text: str) -> dict[str, object]:
    with suppress(ValueError):
        entry = json.loads(text)
        if isinstance(entry, dict):
            return entry
    return {}


def _number(text: str) -> int:
    number = _read(text).get("number")
    return number if isinstance(number, int) else 0


def _host() -> str:
    """This machine, and which of its containers: process numbers mean something inside one only."""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")[:8]
        return f"{os.uname().nodename} {boot} {os.readlink('/proc/self/ns/pid')}"
    return os.uname().nodename
