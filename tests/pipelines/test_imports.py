"""A module of `pipelines` that is imported does nothing yet: nobody is asked, nothing is written."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

WATCHED = """
import importlib, os, sys
from pathlib import Path

done = []
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
CALLS = ("socket.connect", "socket.getaddrinfo", "sqlite3.connect")
CHANGES = ("os.mkdir", "os.remove", "os.rename", "os.symlink", "os.link")

def note(event, arguments):
    writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITES
    place = os.path.abspath(os.fsdecode(arguments[0])) if (writes or event in CHANGES) and arguments[0] != -1 else ""
    if event in CALLS or place.startswith(os.getcwd()):
        done.append((event, str(arguments)))

sys.addaudithook(note)
for name in sys.argv[1:]:
    importlib.import_module(name)
    assert not done, (name, done)
"""


@pytest.mark.slow
def test_importing_a_module_of_pipelines_asks_nobody_and_writes_nothing(root: Path, tmp_path: Path) -> None:
    files = sorted((root / "pipelines").rglob("*.py"))
    names = {".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__") for file in files}
    (tmp_path / ".prefect").mkdir()  # which Prefect itself makes when it is imported
    (tmp_path / ".prefect/api_url").write_text("http://127.0.0.1:1/api")  # as of a server that is there
    command = [sys.executable, "-B", "-W", "ignore", "-c", WATCHED, *sorted(names)]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert run.returncode == 0, run.stderr[-2000:]
