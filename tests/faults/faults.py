"""What can be done to a command, as data. `lab` does it; `child/sitecustomize.py` what happens inside a process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class At:
    """At a named line: the `nth` call of a function, in whichever process it is made."""

    at: str
    """`module:function`, `module:Class.method`, or `disk`: any change of the disk below the project."""
    do: str = "KILL"
    """A signal, or the name of an error number, which is raised there as an OSError."""
    whom: str = "self"
    """`self`, `main` (the command's first process), `all` (the power goes), or part of a program's name."""
    nth: int = 1
    when: Literal["before", "after"] = "before"
    seconds: int = 0
    """With STOP: until it goes on by itself; 0: it does not."""


@dataclass(frozen=True, kw_only=True)
class EveryChange:
    """All is killed before every `step`th change of the disk, a try each, until a try comes to its end."""

    step: int = 1
    first: int = 1


@dataclass(frozen=True, kw_only=True)
class DiskFull:
    """The project's disk has so much room left, and so many files."""

    kib: int | None = None
    inodes: int | None = None


@dataclass(frozen=True, kw_only=True)
class ReadOnly:
    """A folder of the project that may not be written to."""

    folder: str


@dataclass(frozen=True, kw_only=True)
class OpenFiles:
    """So many files may be open in a process."""

    number: int


@dataclass(frozen=True, kw_only=True)
class Memory:
    """So little of /dev/shm is there."""

    kib: int


@dataclass(frozen=True, kw_only=True)
class Clock:
    """The clock is so far off in the first run, which is killed at a line, and right in the next."""

    offset: str
    kill: At


@dataclass(frozen=True, kw_only=True)
class NoNetwork:
    """There is loopback and nothing else."""


@dataclass(frozen=True, kw_only=True)
class Twice:
    """The same command again while the first is held at a line, until the second has ended if `hold.seconds` is 0."""

    hold: At


@dataclass(frozen=True, kw_only=True)
class SyncOrder:
    """The power goes at any time: what takes a final name is on the disk by then, and the name soon after.

    Every fsync and rename of the command is recorded; nothing is broken.
    """


@dataclass(frozen=True, kw_only=True)
class Proof:
    """What a test of the suite does, by its name."""

    test: str


Fault = At | EveryChange | DiskFull | ReadOnly | OpenFiles | Memory | Clock | NoNetwork | Twice | SyncOrder | Proof
Outcome = Literal["dies", "recovers", "sentence", "either"]
"""Of the broken run. `dies`: it is gone, with a signal's status. `recovers`: it ends well all the same. `sentence`: its
exit status is 1, with one sentence. `either`: one of the last two. Whatever it was, the same command then ends well,
with the bits of a run that nothing happened to, and leaves what that leaves."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One line of the matrix."""

    group: str
    job: str
    what: str
    """What breaks, where, when, in words."""
    fault: Fault
    holds: Outcome
    promise: int
    """Of docs/reliability.md."""
    says: str = ""
    """What the sentence has in it (a regular expression)."""
    sample: bool = False
    """Whether the ordinary suite tries it."""

    @property
    def id(self) -> str:
        return f"{self.job}: {self.what}"
