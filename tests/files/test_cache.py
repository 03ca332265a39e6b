from __future__ import annotations

import errno
import gc
import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cigpose.files.cache import GB, ShardCache

SIZE = 1000
Get = Callable[[ShardCache, int], Path]


@pytest.fixture
def get(host: Any) -> Get:
    """Asks a cache for the shard of a number, which a host serves."""

    def ask(cache: ShardCache, number: int) -> Path:
        content = bytes([number]) * SIZE
        address = host.put(f"/{number}.tar", content)
        sha256 = hashlib.sha256(content).hexdigest()
        if cache.find(sha256, SIZE) is None:
            assert b"".join(cache.fetch(address, sha256, SIZE)) == content
        path = cache.find(sha256, SIZE)
        assert path is not None
        return path

    return ask


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def numbers(folder: Path) -> list[int]:
    """Shards that are there."""
    return sorted(path.read_bytes()[0] for path in folder.glob("*.tar"))


def reader(folder: Path, shards: int, held: int = 1) -> ShardCache:
    return ShardCache(str(folder), shards * SIZE / GB, held)


def age(path: Path, seconds: float) -> None:
    os.utime(path, (time.time() - seconds,) * 2)


def test_the_shard_not_used_longest_makes_room(folder: Path, get: Get) -> None:
    cache = reader(folder, 3)
    for number in (1, 2, 3):
        age(get(cache, number), 100 - number)
    get(cache, 1)  # used again
    get(cache, 4)
    assert numbers(folder) == [1, 3, 4]


def test_a_shard_within_the_limit_is_fetched_once(folder: Path, get: Get, host: Any) -> None:
    cache = reader(folder, 2)
    for number in (1, 2, 1, 2):
        get(cache, number)
    assert len(host.requests) == 2
    assert numbers(folder) == [1, 2]


def test_no_limit_removes_nothing(folder: Path, get: Get) -> None:
    cache = ShardCache(str(folder), None, 1)
    for number in range(5):
        get(cache, number)
    assert numbers(folder) == [0, 1, 2, 3, 4]


def test_what_a_reader_holds_stays_beyond_the_limit_and_goes_when_it_lets_go(folder: Path, get: Get) -> None:
    first, second = reader(folder, 1, held=2), reader(folder, 1)
    get(first, 1), get(first, 2)
    get(second, 3)
    assert numbers(folder) == [1, 2, 3]
    get(first, 4)  # holds 2 and 4 from now on
    assert numbers(folder) == [2, 3, 4]
    del first
    gc.collect()
    get(second, 5)
    assert numbers(folder) == [5]


HOLD = """
import sys
from cigpose.files.cache import ShardCache
cache = ShardCache(sys.argv[1], None, 9)
assert cache.find(sys.argv[2], int(sys.argv[3]))
print("held", flush=True)
sys.stdin.read()
"""


def test_what_another_process_holds_stays_until_it_is_dead(folder: Path, get: Get) -> None:
    cache = reader(folder, 1)
    path = get(cache, 1)
    arguments = [sys.executable, "-c", HOLD, str(folder), path.stem, str(SIZE)]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout is not None and other.stdout.readline() == "held\n"
            get(cache, 2)
            get(cache, 3)
            assert numbers(folder) == [1, 3]
        finally:
            other.kill()
    get(cache, 4)
    assert numbers(folder) == [4]


def test_a_shard_that_was_removed_or_cut_is_fetched_again(folder: Path, get: Get) -> None:
    cache = reader(folder, 3)
    path = get(cache, 1)
    path.write_bytes(b"cut")
    assert get(cache, 1).stat().st_size == SIZE
    path.unlink()
    assert get(cache, 1).stat().st_size == SIZE


@pytest.mark.parametrize("forgets", [True, False])
def test_a_forked_child_neither_frees_nor_keeps_what_its_parent_holds(folder: Path, get: Get, forgets: bool) -> None:
    parent, other = reader(folder, 1, held=1), reader(folder, 1)
    get(parent, 1)
    ready, go = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        if forgets:
            del parent
        gc.collect()
        os.write(ready[1], b"x")
        os.read(go[0], 1)
        os._exit(0)
    try:
        os.read(ready[0], 1)
        get(other, 2)
        assert numbers(folder) == [1, 2]
        get(parent, 3)
        assert numbers(folder) == [2, 3]
    finally:
        os.write(go[1], b"x")
        os.waitpid(child, 0)
        for descriptor in (*ready, *go):
            os.close(descriptor)


def test_a_cache_that_may_only_be_read_is_read(folder: Path, get: Get, monkeypatch: pytest.MonkeyPatch) -> None:
    before = get(reader(folder, 3), 1)

    def refuse(*_: Any) -> int:
        raise PermissionError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)
        patch.setattr(os, "utime", refuse)
        assert reader(folder, 3).find(before.stem, SIZE) == before


def test_where_no_process_can_hold_a_shard_none_is_removed(
    folder: Path, get: Get, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    cache = reader(folder, 1)
    for number in (1, 2, 3):
        get(cache, number)
    assert numbers(folder) == [1, 2, 3]


def test_a_copy_is_there_once_all_of_a_shard_was_taken_and_not_before(folder: Path, host: Any) -> None:
    content = bytes(3 << 20)
    address, sha256 = host.put("/0.tar", content), hashlib.sha256(content).hexdigest()
    cache = ShardCache(str(folder), None, 1)
    given_up = cache.fetch(address, sha256, len(content))
    next(given_up)
    beside = cache.fetch(address, sha256, len(content))  # somebody else of the same process must not wait for it
    assert b"".join(beside) == content
    given_up.close()
    assert cache.find(sha256, len(content)) is None and not list(folder.glob("*.part"))
    assert b"".join(cache.fetch(address, sha256, len(content))) == content
    assert cache.find(sha256, len(content)) is not None


def test_what_is_not_the_shard_asked_for_is_given_and_not_kept(folder: Path, host: Any) -> None:
    address = host.put("/0.tar", b"another")
    cache = ShardCache(str(folder), None, 1)
    assert b"".join(cache.fetch(address, "0" * 64, 9)) == b"another"
    assert {path.suffix for path in folder.iterdir()} == {".lock"}


def test_with_a_limit_of_nothing_no_copy_is_made(folder: Path, host: Any) -> None:
    cache = ShardCache(str(folder), 0, 1)
    assert b"".join(cache.fetch(host.put("/0.tar", b"content"), "0" * 64, 9)) == b"content"
    assert cache.find("0" * 64, 7) is None and not folder.exists()
