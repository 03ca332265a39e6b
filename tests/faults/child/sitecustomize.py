"""Breaks a process at a named line of the product, which knows nothing of it. Python runs this before anything else.

The environment says what: CIGPOSE_FAULTS, the JSON of `faults.Plan`. Calls are counted over all processes of a command,
so that a worker that is started again is not broken again.
"""

from __future__ import annotations

import errno
import functools
import importlib.abc
import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

PLAN = json.loads(os.environ.get("CIGPOSE_FAULTS", "{}"))
NOTES = Path(PLAN.get("notes", "/nonexistent"))
MARK = "CIGPOSE_FAULT_LAB"
DISK_CHANGES = ("replace", "rename", "unlink", "mkdir", "rmdir", "fsync")
_real = {name: getattr(os, name) for name in (*DISK_CHANGES, "write", "open", "close")}


def _note(file: str, line: str) -> int:
    """Append a line to a file that all processes share; how many bytes it has then."""
    descriptor = _real["open"](NOTES / file, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        _real["write"](descriptor, line.encode())
        return os.lseek(descriptor, 0, os.SEEK_CUR)
    finally:
        _real["close"](descriptor)


def _break(point: dict[str, Any], place: str) -> None:
    """Do what the plan says if this is the call it means."""
    count = _note("calls", ".")
    if count != point["nth"]:
        return
    _note("fired", f"{place}\n")
    what, whom = point["do"], point["whom"]
    if what in errno.__dict__:
        raise OSError(errno.__dict__[what], os.strerror(errno.__dict__[what]), place)
    sign = getattr(signal, f"SIG{what}")
    targets = _marked() if whom == "all" else [_process(whom)]
    if sign == signal.SIGSTOP and point["seconds"]:
        wake = "; ".join(["sleep {}".format(point["seconds"]), *(f"kill -CONT {target}" for target in targets)])
        # nobody's child: a Ray worker that ends meanwhile takes its own along
        subprocess.run(["sh", "-c", f"({wake}) &"], start_new_session=True, stdout=-3, stderr=-3, check=True)
    for target in sorted(targets, key=lambda target: target == os.getpid()):  # this one last
        os.kill(target, sign)


def _process(whom: str) -> int:
    if whom == "self":
        return os.getpid()
    if whom == "main":
        return int(os.environ["CIGPOSE_FAULTS_MAIN"])
    found = [pid for pid in _marked() if whom in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].decode()]
    return found[0]


def _marked() -> list[int]:
    """Every process of this command: they have its mark in their environment."""
    mark, found = f"{MARK}={os.environ[MARK]}".encode(), []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
        except OSError:
            continue
    return found


def _broken(function: Callable[..., Any], point: dict[str, Any], place: str) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        if point["when"] == "before":
            _break(point, place)
        result = function(*args, **options)
        if point["when"] == "after":
            _break(point, place)
        return result

    return call


def _patch(module: Any, point: dict[str, Any]) -> None:
    owner, (*path, name) = module, point["at"].partition(":")[2].split(".")
    for part in path:
        owner = getattr(owner, part)
    setattr(owner, name, _broken(getattr(owner, name), point, point["at"]))


class _Loader(importlib.abc.Loader):
    def __init__(self, inner: Any, points: list[dict[str, Any]]) -> None:
        self.inner, self.points = inner, points

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def create_module(self, spec: Any) -> Any:
        return self.inner.create_module(spec)

    def exec_module(self, module: Any) -> None:
        self.inner.exec_module(module)
        for point in self.points:
            _patch(module, point)


class _Finder(importlib.abc.MetaPathFinder):
    """Lets the others find a module, and patches it once it is loaded."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: Any = None) -> Any:
        points = [point for point in PLAN["points"] if point["at"].partition(":")[0] == name]
        if not points:
            return None
        for finder in sys.meta_path:
            if finder is not self and (spec := finder.find_spec(name, path, target)) is not None:
                spec.loader = _Loader(spec.loader, points)
                return spec
        return None


def _state(path: str) -> list[int]:
    facts = os.stat(path)
    return [facts.st_dev, facts.st_ino, facts.st_mtime_ns]


def _record_disk() -> None:
    """Note every sync and every rename, with the state of what it is about, in their order."""

    def fsync(descriptor: int) -> None:
        _real["fsync"](descriptor)
        facts = os.fstat(descriptor)
        state = [facts.st_dev, facts.st_ino, facts.st_mtime_ns]
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        _note("disk", json.dumps({"call": "fsync", "path": path, "state": state}) + "\n")

    def renamed(name: str) -> Callable[..., None]:
        def call(source: Any, target: Any, **options: Any) -> None:
            files = [os.path.abspath(source)]
            if os.path.isdir(source) and not os.path.islink(source):
                inside = ((folder, [*folders, *names]) for folder, folders, names in os.walk(files[0]))
                files += [os.path.join(folder, name) for folder, names in inside for name in names]
            states = {os.path.relpath(file, files[0]): _state(file) for file in files}
            _real[name](source, target, **options)
            entry = {"call": "rename", "path": os.path.abspath(target), "from": files[0], "states": states}
            _note("disk", json.dumps(entry) + "\n")

        return call

    os.fsync, os.replace, os.rename = fsync, renamed("replace"), renamed("rename")  # type: ignore[assignment]


def _break_disk(point: dict[str, Any]) -> None:
    """Let the nth change of the disk below the project, and none after it, not happen."""

    def guard(name: str) -> None:
        @functools.wraps(_real[name])
        def call(path: Any, *args: Any, **options: Any) -> Any:
            place = os.readlink(f"/proc/self/fd/{path}") if isinstance(path, int) else os.path.abspath(path)
            if os.fsdecode(place).startswith(PLAN["project"]):
                _break(point, f"os.{name} {os.fsdecode(place)}")
            return _real[name](path, *args, **options)

        setattr(os, name, call)

    for name in DISK_CHANGES:
        guard(name)


if PLAN:
    os.environ.setdefault("CIGPOSE_FAULTS_MAIN", str(os.getpid()))
    if PLAN.get("record"):
        _record_disk()
    for _point in PLAN["points"]:
        if _point["at"] == "disk":
            _break_disk(_point)
    sys.meta_path.insert(0, _Finder())
