from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import sqlite3
from pathlib import Path

import pytest

from cigpose.config import Config
from pipelines.tracking.address import connect
from pipelines.tracking.courier import tracked
from pipelines.tracking.database import DatabaseError


def _set_up_until(address: str, statement: int) -> None:
    """Make the database, and die at its n-th statement."""
    from sqlalchemy import event
    from sqlalchemy.engine import Engine

    count = 0

    @event.listens_for(Engine, "before_cursor_execute")
    def _die(*_: object) -> None:
        nonlocal count
        count += 1
        if count == statement:
            os.kill(os.getpid(), signal.SIGKILL)

    connect(address)


def set_up_and_kill(address: str, statement: int) -> int | None:
    child = multiprocessing.get_context("fork").Process(target=_set_up_until, args=(address, statement))
    child.start()
    child.join(60)
    return child.exitcode


@pytest.mark.slow
def test_a_set_up_killed_anywhere_leaves_nothing_that_stops_the_next_start(project: Path, config: Config) -> None:
    (project / "mlflow.db").unlink()
    address = f"sqlite:///{project}/mlflow.db"
    for statement in (40, 150, 300, 450):
        assert set_up_and_kill(address, statement) == -signal.SIGKILL
        assert not (project / "mlflow.db").exists()
    with tracked(config, project / ".runs/a") as run:
        pass
    assert connect(address).get_run(run.run_id).info.status == "FINISHED"
    assert not list(project.glob(".mlflow.db.*"))


def _set_up_without_room(address: str) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
    try:
        connect(address)
    except OSError as err:
        os._exit(7 if "mlflow.db: MLflow's database could not be made: " in str(err) else 8)


@pytest.mark.slow
def test_a_set_up_without_room_is_one_sentence_and_leaves_nothing(project: Path) -> None:
    (project / "mlflow.db").unlink()
    address = f"sqlite:///{project}/mlflow.db"
    child = multiprocessing.get_context("fork").Process(target=_set_up_without_room, args=(address,))
    child.start()
    child.join(60)
    assert child.exitcode == 7
    assert [path.name for path in project.iterdir()] == ["mlflow.db.lock"]
    assert connect(address).search_experiments(max_results=1)


@pytest.mark.slow
def test_an_empty_file_is_no_database_yet(project: Path) -> None:
    (project / "mlflow.db").write_bytes(b"")
    assert connect(f"sqlite:///{project}/mlflow.db").search_experiments(max_results=1)


@pytest.mark.parametrize("found", ["half a database", "no database"])
def test_what_is_no_whole_database_is_named_and_left_alone(project: Path, found: str) -> None:
    path = project / "mlflow.db"
    if found == "half a database":  # what a killed set-up of an earlier version left
        with sqlite3.connect(path) as connection:
            connection.execute("DROP TABLE trace_tags")
            connection.execute("UPDATE alembic_version SET version_num = '0584bdc529eb'")
        connection.close()
    else:
        path.write_bytes(b"no sqlite" * 1000)
    before = path.read_bytes()
    with pytest.raises(DatabaseError, match=r"mlflow\.db: not a whole MLflow database \(.*\)\. .* move the file away"):
        connect(f"sqlite:///{path}")
    assert path.read_bytes()[:2000] == before[:2000]


def _write_and_die(path: Path) -> None:
    connection = sqlite3.connect(path, isolation_level=None)
    connection.executescript("PRAGMA journal_mode = DELETE; PRAGMA cache_size = 1; BEGIN; CREATE TABLE more (text);")
    for _ in range(2000):  # more than the cache holds: half of it is in the file before it is committed
        connection.execute("INSERT INTO more VALUES (?)", ("x" * 500,))
    os.kill(os.getpid(), signal.SIGKILL)


def test_what_a_killed_writer_has_half_written_is_taken_back(project: Path) -> None:
    child = multiprocessing.get_context("fork").Process(target=_write_and_die, args=(project / "mlflow.db",))
    child.start()
    child.join(60)
    assert (project / "mlflow.db-journal").stat().st_size > 0
    assert connect(f"sqlite:///{project}/mlflow.db").search_experiments(max_results=1)
    with sqlite3.connect(project / "mlflow.db") as connection:
        assert not connection.execute("SELECT name FROM sqlite_master WHERE name = 'more'").fetchall()
