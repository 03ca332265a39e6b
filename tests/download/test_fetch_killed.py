"""A download that ends at any moment goes on at the next start and ends with the same bytes."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from cigpose.config import DownloadConfig
from cigpose.download.fetch import fetch
from cigpose.download.sources import SourceFile, table_of

CONTENT = {name: json.dumps([name] * 20_000).encode() for name in ("a.json", "b.json", "c.json")}
HOST = "https://images.example.org/"
TABLE = table_of(*(SourceFile(name=name, urls=(HOST + name,), licence="free") for name in CONTENT))


class Killed(BaseException):
    """Stands for the end of the process."""


def serve(host, path: str = "/images.example.org/") -> DownloadConfig:
    for name, content in CONTENT.items():
        host.put(path + name, content)
    return DownloadConfig(sources={}, mirror=host.address, parallel_files=1, timeout_s=5.0, max_attempts=3)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def entries(manifest: bytes) -> set[str]:
    return {json.dumps(entry) for entry in json.loads(manifest)["files"]}


def crash_at(monkeypatch: pytest.MonkeyPatch, number: int) -> list[int]:
    """Let the `number`th change of the disk not happen, nor any after it. Returns the count so far, in a list."""
    count = [0]

    def guard(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def guarded(*args: Any, **options: Any) -> Any:
            count[0] += 1
            if count[0] > number:
                raise Killed
            return original(*args, **options)

        monkeypatch.setattr(owner, name, guarded)

    for name in ("replace", "unlink", "touch", "write_text", "mkdir", "rmdir"):
        guard(Path, name)
    for name in ("fsync", "replace"):
        guard(os, name)
    return count


@pytest.mark.slow
def test_after_a_crash_between_any_two_changes_of_the_disk_a_rerun_ends_the_same(
    host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = serve(host)
    fetch(tmp_path / "whole", list(CONTENT), options, table=TABLE, say=lambda line: None)
    expected = contents(tmp_path / "whole")
    assert set(expected) == {*CONTENT, "manifest.json"}
    for number in range(1000):
        folder = tmp_path / str(number)
        with monkeypatch.context() as patch:
            count = crash_at(patch, number)
            with suppress(Killed):
                fetch(folder, list(CONTENT), options, table=TABLE, say=lambda line: None)
            crashed = count[0] > number
        for name, found in contents(folder).items() if folder.exists() else ():
            if name == "manifest.json":  # of the files in place so far
                assert entries(found) <= entries(expected[name]), f"crash {number} left a wrong {name}"
            elif ".partial" not in name and not name.endswith(".part"):
                assert found == expected[name], f"crash {number} left a wrong {name}"
        fetch(folder, list(CONTENT), options, table=TABLE, say=lambda line: None)
        assert contents(folder) == expected, f"after crash {number}"
        assert not (folder / ".partial").exists()
        if not crashed:
            break
    assert number > 20


@pytest.mark.slow
def test_a_process_killed_again_and_again_fetches_no_byte_twice(host, tmp_path: Path) -> None:
    options = serve(host)
    host.bytes_per_s = 400_000  # 0.8 s for the three, and a start of Python each time
    script = (
        "from pathlib import Path; from cigpose.config import DownloadConfig; from cigpose.download.fetch import fetch;"
        "from cigpose.download.sources import SourceFile, table_of;"
        f"t = table_of(*(SourceFile(name=n, urls=({HOST!r} + n,), licence='free') for n in {list(CONTENT)!r}));"
        f"fetch(Path('raw'), list(t), DownloadConfig(sources={{}}, mirror={options.mirror!r}), table=t)"
    )
    kills = 0
    while kills < 20:
        before = sum(host.sent.values())
        process = subprocess.Popen(
            [sys.executable, "-c", script], cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        while process.poll() is None and sum(host.sent.values()) < before + 120_000:
            time.sleep(0.005)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
        _, errors = process.communicate()
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, errors.decode()
        kills += 1
    assert kills >= 3
    found = contents(tmp_path / "raw")
    manifest = json.loads(found.pop("manifest.json"))["files"]
    assert found == CONTENT
    assert {item["file"]: item["sha256"] for item in manifest} == {
        name: hashlib.sha256(content).hexdigest() for name, content in CONTENT.items()
    }
    # What was sent and not kept: at most what lay in the sockets' buffers at a kill, here a few pieces of 20 ms.
    wasted = sum(sent for path, sent in host.sent.items() if path.startswith("/images")) - sum(
        map(len, CONTENT.values())
    )
    assert wasted <= kills * 3 * 40_000
