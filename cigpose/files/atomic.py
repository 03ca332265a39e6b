"""The one way to write a file or a folder: whole or not at all, and by one process at a time.

What stands under its final name is complete and on the disk; a killed writer leaves `.<name>.<random>.part` beside it.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

_LEFT = re.compile(r"\.(.+)\.\w{8}\.(part|old)")
"""Names of what becomes, or was, the file or folder that the first group names."""


class ClaimedError(OSError):
    """Another process does what may be done by one at a time."""


@contextmanager
def written_file(target: str | Path) -> Iterator[Path]:
    """A temporary path beside `target`, which takes its place when the block ends well and is gone when it does not.

    A link is replaced, not written through: what it points at (DVC's cache) stays as it was.
    """
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    part = _beside(target)
    part.touch(exist_ok=False)
    try:
        yield part
        sync(part)
        os.replace(part, target)
        sync(target.parent)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def written_folder(target: str | Path) -> Iterator[Path]:
    """A temporary folder beside `target`, which takes its place, content and all, when the block ends well.

    An earlier `target` is moved aside first and removed last, so that there is no moment with half of either.
    """
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    part = _beside(target)
    part.mkdir()
    try:
        yield part
        for path in [*part.rglob("*"), part]:
            if not path.is_symlink():
                sync(path)
        replace_folder(part, target)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def replace_folder(made: Path, target: Path) -> None:
    """Let a finished folder take the name `target`; what stood there is removed once that is done."""
    old = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.", suffix=".old"))
    try:
        if target.is_symlink():
            target.unlink()
        elif target.exists():
            os.replace(target, old / target.name)
        os.replace(made, target)
        sync(target.parent)
    except BaseException:
        if (old / target.name).exists() and not target.exists():
            os.replace(old / target.name, target)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def clear_leftovers(target: str | Path) -> None:
    """Remove what killed writers of `target` left beside it; a `target` that one had moved aside comes back.

    Only for the holder of the target's lock: a dead writer's files look like a living one's.
    """
    target = Path(target)
    for path in sorted(target.parent.glob(".*")):
        if not (left := _LEFT.fullmatch(path.name)) or left[1] != target.name:
            continue
        if path.suffix == ".old" and (path / target.name).exists() and not target.exists():
            os.replace(path / target.name, target)
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def clear_leftovers_in(folder: Path) -> None:
    """`clear_leftovers` of whatever was being written to a folder; for the one who alone writes there."""
    for name in {left[1] for path in folder.glob(".*") if (left := _LEFT.fullmatch(path.name))}:
        clear_leftovers(folder / name)


def write_bytes(target: str | Path, content: bytes) -> None:
    """A small file, at once or not at all."""
    with written_file(target) as part:
        part.write_bytes(content)


def write_text(target: str | Path, text: str) -> None:
    """A small UTF-8 file, at once or not at all."""
    write_bytes(target, text.encode())


def write_json(target: str | Path, value: Any, *, sort_keys: bool = False) -> None:
    """A small JSON file, at once or not at all."""
    write_text(target, json.dumps(value, indent=1, sort_keys=sort_keys) + "\n")


def sync(path: str | Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as err:
        if err.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that cannot sync folders
            raise
    finally:
        os.close(descriptor)


@contextmanager
def claimed(lock: str | Path, what: str, *, wait: bool = False) -> Iterator[None]:
    """Do `what` while no other process, on any machine that shares the folder, does it.

    The kernel gives the lock of a dead owner back. The file stays; it says who holds the lock, since when.

    Args:
        lock: a file of its own, made if it is not there.
        what: for the message, such as "a training of this run".
        wait: wait for the owner to end in place of raising.

    Raises:
        ClaimedError: another process holds it.
    """
    lock = Path(lock)
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as err:
            raise ClaimedError(f"{what} is running already ({_owner(lock)}). Wait until it ends, or stop it.") from err
        except OSError as err:
            if err.errno not in (errno.ENOLCK, errno.ENOTSUP):  # a file system without locks
                raise
        file.truncate(0)
        file.write(json.dumps({"pid": os.getpid(), "host": os.uname().nodename, "since": _now()}))
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)


def _owner(lock: Path) -> str:
    with suppress(OSError, ValueError, KeyError, TypeError):
        owner = json.loads(lock.read_text(encoding="utf-8"))
        since = datetime.fromisoformat(owner["since"])
        age = timedelta(seconds=int((datetime.now().astimezone() - since).total_seconds()))
        return f"process {owner['pid']} on {owner['host']}, since {owner['since']}, {age} ago"
    return f"it holds {lock}"


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")


def _beside(target: Path) -> Path:
    """A name of its own; files made under it get the mode that `open` gives (tempfile's are for their owner alone)."""
    return target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
