"""Copies of remote shards on this machine, shared by its processes: bounded, what was not used longest goes first.

    <folder>/<sha256>.tar         whole and checked; its time is that of its last use
    <folder>/<sha256>.lock        of the process that fetches it
    <folder>/<sha256>.held.lock   shared by those that read it; who removes it must have it alone

A tar's name is its sha256, so a new version of a dataset never meets an old file. A copy is made while a reader takes
the shard's bytes as they come, so nobody waits for a whole shard; with a limit of 0 none is kept.

webdataset has a cache too (`FileCache`, `LRUCleanup`): it does not check what it fetched, goes by the time of the fetch
and not of the last use, and removes what other processes read. fsspec's has no limit.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import platformdirs

from cigpose.files.atomic import ClaimedError, claimed, clear_leftovers, written_file
from cigpose.files.objects import stream_object

GB = 10**9


class _OtherError(Exception):
    """What was fetched is not what was asked for."""


class ShardCache:
    """The cache as one reader sees it.

    Args:
        folder: where the copies are; None for the user's cache directory.
        limit_gb: size beyond which unused copies are removed; None for no limit, 0 to keep none. What readers hold is
            never removed, so the cache is larger while they need more than that.
        held: shards that this reader holds, those it asked for last: as many as it may still open by their path.
    """

    def __init__(self, folder: str | None = None, limit_gb: float | None = None, held: int = 64) -> None:
        self.folder = Path(folder).expanduser() if folder else Path(platformdirs.user_cache_dir("cigpose")) / "shards"
        self._limit = None if limit_gb is None else int(limit_gb * GB)
        self._held = held
        self._locks: OrderedDict[str, int] = OrderedDict()
        self._process = os.getpid()
        self._changing = threading.Lock()

    def __del__(self) -> None:
        for descriptor in getattr(self, "_locks", {}).values():
            os.close(descriptor)

    def find(self, sha256: str, size: int) -> Path | None:
        """The copy of a shard, if there is one; it is held then, and counts as used.

        Args:
            sha256: of the shard.
            size: its bytes.
        """
        if self._limit == 0:
            return None
        if self._process != os.getpid():  # after a fork: the parent's locks are the parent's
            self._locks, self._process, self._changing = OrderedDict(), os.getpid(), threading.Lock()
        path = self._path(sha256)
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._changing:
            self._hold(path)
        if not _is_there(path, size):
            return None
        with suppress(OSError):  # another user's cache may be read
            os.utime(path)
        return path

    def fetch(self, address: str, sha256: str, size: int) -> Iterator[bytes]:
        """The bytes of a shard as they come. Once all of them were taken, the copy is there, if it is the right shard.

        None is made with a limit of 0, nor while another reader of the same shard makes one: two that wait for each
        other's shards would wait for ever.

        Args:
            address: of the tar.
            sha256: what its content must have to be kept.
            size: its bytes.

        Raises:
            FetchError: the address does not give it.
        """
        if self._limit == 0:
            yield from stream_object(address, size)
            return
        path = self._path(sha256)
        claim = claimed(path.with_suffix(".lock"), "a fetch of this shard")
        try:
            claim.__enter__()
        except ClaimedError:
            yield from stream_object(address, size)
            return
        with ExitStack() as stack:
            stack.push(claim)
            clear_leftovers(path)
            self._make_room(size)
            digest = hashlib.sha256()
            with suppress(_OtherError), written_file(path) as part, part.open("wb") as file:
                for chunk in stream_object(address, size):
                    digest.update(chunk)
                    file.write(chunk)
                    yield chunk
                if digest.hexdigest() != sha256:
                    raise _OtherError

    def _path(self, sha256: str) -> Path:
        return self.folder / f"{sha256}.tar"

    def _hold(self, path: Path) -> None:
        """Keep a shard from being removed, and let go of the one that was asked for longest ago."""
        if path.stem not in self._locks:
            try:
                lock = _opened(_held_lock(path))
            except OSError as err:
                if err.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
                    return  # a cache that this process may only read
                raise
            self._locks[path.stem] = lock
            with suppress(OSError):  # a file system without locks: there nothing is removed (`_remove_unheld`)
                fcntl.flock(lock, fcntl.LOCK_SH)
        self._locks.move_to_end(path.stem)
        while len(self._locks) > self._held:
            _, oldest = self._locks.popitem(last=False)
            with suppress(OSError):
                fcntl.flock(oldest, fcntl.LOCK_UN)  # of the copies too that a fork has made
            os.close(oldest)

    def _make_room(self, size: int) -> None:
        """Remove shards that nobody holds, the one not used longest first, until `size` more bytes fit."""
        if self._limit is None:
            return
        with claimed(self.folder / "room.lock", "a clearing of the cache", wait=True):
            shards = sorted((status.st_mtime, status.st_size, path) for path, status in _shards_of(self.folder))
            excess = sum(num_bytes for _, num_bytes, _ in shards) + size - self._limit
            for _, num_bytes, path in shards:
                if excess <= 0:
                    return
                excess -= num_bytes if _remove_unheld(path) else 0


def _is_there(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _shards_of(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    for path in folder.glob("*.tar"):
        with suppress(FileNotFoundError):
            yield path, path.stat()


def _held_lock(path: Path) -> Path:
    return path.with_suffix(".held.lock")


def _opened(lock: Path) -> int:
    return os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)


def _remove_unheld(path: Path) -> bool:
    """Remove a shard unless a process holds it, or none could; whether it is gone."""
    try:
        lock = _opened(_held_lock(path))
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink(missing_ok=True)
        return True
    except OSError:
        return False
    finally:
        os.close(lock)
