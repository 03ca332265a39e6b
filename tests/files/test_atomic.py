"""Whole or not at all, and by one at a time."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cigpose.files import atomic
from cigpose.files.atomic import ClaimedError, claimed, clear_leftovers, written_file, written_folder

HOLD = """
import sys
from cigpose.files.atomic import claimed
with claimed(sys.argv[1], "the work"):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_failed_write_leaves_the_old_file_and_nothing_beside_it(tmp_path: Path) -> None:
    target = tmp_path / "metrics.json"
    target.write_text("old")
    with pytest.raises(RuntimeError), written_file(target) as part:
        part.write_text("half")
        raise RuntimeError
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_link_is_replaced_and_what_it_points_at_stays(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.write_text("cached")
    (tmp_path / "out").symlink_to(cache)
    with written_file(tmp_path / "out") as part:
        part.write_text("new")
    assert cache.read_text() == "cached"
    assert (tmp_path / "out").read_text() == "new"
    assert not (tmp_path / "out").is_symlink()


def test_a_written_file_has_the_mode_that_open_would_give(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    with written_file(tmp_path / "whole") as part:
        part.write_text("x")
    assert (tmp_path / "whole").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_folder_is_swapped_as_a_whole(tmp_path: Path) -> None:
    target = tmp_path / "model"
    target.mkdir()
    (target / "stale").touch()
    with written_folder(target) as part:
        (part / "sub").mkdir()
        (part / "sub" / "fresh").write_text("1")
        assert (target / "stale").is_file()
    assert [path.name for path in target.rglob("*")] == ["sub", "fresh"]
    assert list(tmp_path.iterdir()) == [target]


def test_a_failed_folder_leaves_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "model"
    target.mkdir()
    (target / "kept").touch()
    with pytest.raises(RuntimeError), written_folder(target) as part:
        (part / "half").touch()
        raise RuntimeError
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "kept"]


def test_a_claim_names_its_owner_and_a_dead_owner_loses_it(tmp_path: Path) -> None:
    lock = tmp_path / "run" / "lock"
    owner = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert owner.stdout.readline() == "held\n"
        with pytest.raises(
            ClaimedError,
            match=rf"^the work is running already \(process {owner.pid} on .*, since 20.*, 0:00:\d\d ago\)\.",
        ):
            claimed(lock, "the work").__enter__()
    finally:
        owner.kill()
        owner.communicate()
    with claimed(lock, "the work"):
        assert str(os.getpid()) in lock.read_text()
    assert lock.read_text() == ""


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_what_a_killed_writer_left_is_cleared_and_the_old_folder_is_back(
    tmp_path: Path, renames: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "model"
    target.mkdir()
    (target / "weights").write_text("old")
    (tmp_path / ".model.notes.part").write_text("somebody else's")

    class Killed(BaseException):
        pass

    replace, done = os.replace, []

    def killed_after(source: object, destination: object) -> None:
        if len(done) == renames:
            raise Killed
        done.append(source)
        replace(source, destination)  # type: ignore[call-overload]

    part = tmp_path / ".model.0123abcd.part"
    part.mkdir()
    (part / "weights").write_text("new")
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed_after)
        patch.setattr(atomic.shutil, "rmtree", lambda *_, **__: None)
        if renames < 2:
            with pytest.raises(Killed):
                atomic.replace_folder(part, target)
        else:
            atomic.replace_folder(part, target)
    clear_leftovers(target)
    assert (target / "weights").read_text() == ("new" if renames == 2 else "old")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".model.notes.part", "model"]
