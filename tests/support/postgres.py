"""Debian's PostgreSQL for a test: a cluster of its own, on a free port of the loopback, gone afterwards."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipelines.ui import free_port

USER = "postgres"
"""Who runs it: the server refuses root. Debian's package makes this user."""


def binaries() -> Path | None:
    """The folder with initdb and pg_ctl of the newest version; None where it is not installed."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: float(path.parts[4]))
    return found[-1].parent if found else None


@contextmanager
def running_postgres(folder: Path) -> Iterator[str]:
    """The address of an empty database for SQLAlchemy."""
    programs, place, port = binaries(), Path(tempfile.mkdtemp(prefix="cigpose-pg-")), free_port()
    assert programs is not None

    def run(*command: str) -> None:
        user = ["runuser", "-u", USER, "--"] if os.geteuid() == 0 else []
        with (folder / "postgres.log").open("a") as log:  # not a pipe: the server would hold it open
            subprocess.run([*user, *command], cwd=place, stdout=log, stderr=log, check=True, timeout=120)

    if os.geteuid() == 0:
        shutil.chown(place, USER)
    data = str(place / "data")
    try:
        run(str(programs / "initdb"), "-D", data, "-U", USER, "--auth=trust", "--no-sync", "-E", "UTF8")
        options = f"-p {port} -k {place} -c listen_addresses=127.0.0.1 -c fsync=off"
        run(str(programs / "pg_ctl"), "-D", data, "-w", "-l", str(place / "log"), "-o", options, "start")
        try:
            yield f"postgresql://{USER}@127.0.0.1:{port}/postgres"
        finally:
            run(str(programs / "pg_ctl"), "-D", data, "-w", "-m", "immediate", "stop")
    finally:
        shutil.rmtree(place, ignore_errors=True)
