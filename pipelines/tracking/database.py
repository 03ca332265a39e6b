"""MLflow's sqlite file: made whole under another name, so that a killed set-up leaves nothing behind that is used."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from mlflow.exceptions import MlflowException
from sqlalchemy.exc import SQLAlchemyError

from cigpose.files.atomic import claimed, written_file

SQLITE = "sqlite:///"
_ADDRESSES = {
    "experiments": "artifact_location",
    "runs": "artifact_uri",
    "logged_models": "artifact_location",
    "model_versions": "storage_location",
}
"""Table -> column with addresses of artifacts."""
_HALF_MADE = re.compile(r"already exists|no such table|no such column|duplicate column|Can't locate revision")


class DatabaseError(OSError):
    """A sqlite file that MLflow cannot use."""


def database_path(address: str) -> Path | None:
    """The file behind a sqlite address; None for a server."""
    return Path(address.removeprefix(SQLITE)) if address.startswith(SQLITE) else None


def artifacts_beside(path: Path) -> Path:
    """The folder with the files of runs and models whose database is at `path`."""
    return path.absolute().with_name("mlartifacts")


@contextmanager
def prepared(path: Path) -> Iterator[None]:
    """Open the database within: it is there, complete, and nobody else sets it up meanwhile.

    Where it was moved together with its artifacts, its addresses of them follow.

    Raises:
        DatabaseError: what is there is no database, or one whose set-up was cut short.
        OSError: a new one cannot be made, as on a full disk.
    """
    with claimed(path.with_name(path.name + ".lock"), f"the set-up of {path}", wait=True):
        if tables := _tables(path):
            _follow_move(path, tables)
        else:
            _make(path)
        try:
            yield
        except (SQLAlchemyError, MlflowException) as err:
            if not (found := _HALF_MADE.search(str(err))):
                raise
            raise _unusable(path, f"MLflow finds: {str(err)[: found.end()].splitlines()[-1][-120:]}") from err


def _tables(path: Path) -> list[str]:
    if not path.is_file():
        return []
    try:  # rw: what a killed writer has left half written is taken back by the next who opens the file
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=rw", uri=True, timeout=20)) as connection:
            return [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
    except sqlite3.DatabaseError as err:
        if isinstance(err, sqlite3.OperationalError):  # locked, not readable: no fault of what is in it
            raise OSError(f"{path}: {err}. Is another program holding it, or is it not yours to read?") from err
        raise _unusable(path, str(err)) from err


def _follow_move(path: Path, tables: list[str]) -> None:
    """Let the addresses of artifacts, which MLflow keeps absolute, be those of the folder beside the database.

    Only of a database that lay beside its `mlartifacts` before, and does so now: one that was moved, or copied, whole.
    """
    here = artifacts_beside(path)
    if "experiments" not in tables or not here.is_dir():
        return
    with closing(sqlite3.connect(path, timeout=20)) as connection, connection:
        first = connection.execute("SELECT artifact_location FROM experiments WHERE experiment_id = 0").fetchone()
        before = (first[0] or "").rpartition("/")[0] if first else ""
        if before == here.as_uri() or not before.startswith("file:") or not before.endswith(f"/{here.name}"):
            return
        for table, column in _ADDRESSES.items():
            if table in tables:
                connection.execute(  # the folder itself, which experiments of ours have, or what lies in it
                    f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE substr({column} || '/', 1, ?) = ?",
                    (here.as_uri(), len(before) + 1, len(before) + 1, f"{before}/"),
                )


def _unusable(path: Path, found: str) -> DatabaseError:
    return DatabaseError(
        f"{path}: not a whole MLflow database ({found}). A set-up of it may have been killed: move the file away; a "
        "new one is made, and runs that still have their folder in .runs/ are sent to it again."
    )


def _make(path: Path) -> None:
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore  # slow to import, and needed once

    for left in path.parent.glob(f".{path.name}.*.part*"):  # of killed set-ups; the lock says that none is at work
        left.unlink(missing_ok=True)
    with written_file(path) as part:
        try:
            store = SqlAlchemyStore(f"{SQLITE}{part}", artifacts_beside(path).as_uri())
        except (SQLAlchemyError, MlflowException) as err:
            reason = str(err).splitlines()[0]
            raise OSError(f"{path}: MLflow's database could not be made: {reason}. Is there room on the disk?") from err
        store.engine.dispose()
        with closing(sqlite3.connect(part)) as connection:
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")  # all of it in the one file that is renamed
