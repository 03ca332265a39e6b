"""A Postgres of the tests' own on the loopback, where Debian's or another `postgresql` is installed."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

USER, PASSWORD = "cigpose", "of-the-tests"


class Postgres:
    """A running server."""

    def __init__(self, port: int, programs: Path) -> None:
        self.port, self._programs = port, programs

    def make_database(self, name: str) -> str:
        """The address of a new database, `postgresql://...`."""
        self.run("postgres", f'CREATE DATABASE "{name}"')
        return f"postgresql://{USER}:{PASSWORD}@127.0.0.1:{self.port}/{name}"

    def run(self, database: str, statement: str) -> str:
        """What a statement gives, a line for each row."""
        command = [self._programs / "psql", "-h", "127.0.0.1", "-p", str(self.port), "-U", USER, "-d", database]
        environment = {**os.environ, "PGPASSWORD": PASSWORD}
        answer = subprocess.run(
            [*command, "-XAtqc", statement], env=environment, check=True, capture_output=True, text=True, timeout=60
        )
        return answer.stdout.strip()


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """One server for all tests, each of which makes its own databases; skips where there is none."""
    programs = _find_programs()
    if programs is None:
        pytest.skip("no Postgres here (Debian: apt-get install postgresql)")
    with contextlib.ExitStack() as cleanup:
        # not pytest's folder, into which nobody but its owner may go: Postgres refuses to run as root
        folder = Path(tempfile.mkdtemp(prefix="cigpose-postgres-"))
        cleanup.callback(shutil.rmtree, folder, ignore_errors=True)
        as_user = {}
        if os.getuid() == 0:
            account = pwd.getpwnam("postgres")
            as_user = {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}
            os.chown(folder, account.pw_uid, account.pw_gid)
        (folder / "password").write_text(PASSWORD)
        (folder / "password").chmod(0o644)
        make = [programs / "initdb", "-D", folder / "data", "-U", USER, "--pwfile", folder / "password"]
        subprocess.run(
            [*make, "-A", "scram-sha-256", "-E", "UTF8", "--locale", "C", "--no-sync"],
            **as_user, cwd=folder, check=True, capture_output=True, timeout=120,
        )  # fmt: skip
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        with (folder / "log").open("wb") as log:
            server = subprocess.Popen(
                [programs / "postgres", "-D", folder / "data", "-h", "127.0.0.1", "-p", str(port), "-k", folder, "-F"],
                **as_user, cwd=folder, stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip
        cleanup.callback(server.wait, 60)
        cleanup.callback(server.terminate)
        found = Postgres(port, programs)
        deadline = time.monotonic() + 60
        while True:
            with contextlib.suppress(subprocess.CalledProcessError):
                found.run("postgres", "SELECT 1")
                break
            assert server.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()[-2000:]
            time.sleep(0.1)
        yield found


def _find_programs() -> Path | None:
    """The folder of initdb, postgres and psql; Debian's is not on the path."""
    folders = [Path(found).resolve().parent for found in [shutil.which("postgres")] if found]
    folders += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return next((folder for folder in folders if (folder / "initdb").is_file() and (folder / "psql").is_file()), None)
