from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

import pipelines  # noqa: F401  (quiets every tool before it is imported)

os.environ.setdefault("CIGPOSE_NO_PROGRESS", "1")
# Threads of torch that wait for busy cores cost ten times their work; the commands that tests start inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A test run in a shell's background ignores Ctrl-C, and so would the commands that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

pytest_plugins = ["postgres", "scripted_host", "sharder", "tiny_shards"]  # fixtures of several rooms; in tests/support
ROOT = Path(__file__).resolve().parents[1]


LONGEST = (
    "test_end_to_end",
    "test_train_stage",
    "test_retrain",
    "test_real_people",
    "test_sample",
    "test_registry",
    "test_stages",
)
"""Files that take minutes, the longest first; then those with the most slow tests."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, so that no process is left alone with one at the end."""
    rank = {name: place for place, name in enumerate(LONGEST)}
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: (rank.get(item.path.stem, len(rank)), -slow[item.path], str(item.path)))


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture(scope="session")
def shared() -> Path:
    """Reference material that lies beside the checkout; tests that need it are skipped without."""
    folder = ROOT.parent / "shared"
    if not (folder / "golden").is_dir():
        pytest.skip("../shared is not there: the large set of reference numbers and the mirror of the download hosts")
    return folder


@pytest.fixture(scope="session")
def golden() -> Path:
    """Reference numbers of the original code, in the checkout (see its README.md)."""
    return ROOT / "tests" / "golden"


@pytest.fixture(scope="session")
def large_golden(shared: Path) -> Path:
    """The large set that `golden` is a part of: whole arrays, real pictures and their crops."""
    return shared / "golden"


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Torch computes on one thread, as it did for the reference numbers.

    Small models gain nothing from a second: on busy cores the two wait for each other, ten times as long and more.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def mirror_folder(shared: Path) -> Path:
    """A few MB that look like the hosts of the datasets, good files and broken ones."""
    return shared / "mirror"


@contextmanager
def _serving(script: Path, folder: Path, *options: str) -> Iterator[str]:
    """Address of a server of `folder` on a free port of the loopback; stopped on leaving."""
    command = [sys.executable, str(script), str(folder), "--quiet", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            port = server.stdout.readline().strip()  # the first line, once it listens
            assert port.isdigit(), f"{script.name} did not start: {port!r}"
            yield f"http://127.0.0.1:{port}"
        finally:
            server.kill()  # not terminate: a slow transfer would be waited for


@pytest.fixture(scope="session")
def mirror(shared: Path) -> Iterator[str]:
    """Address of a mirror of the download hosts without faults, for `data.download.mirror`; one for all tests."""
    with _serving(shared / "serve_mirror.py", shared / "mirror") as address:
        yield address


@pytest.fixture
def start_mirror(shared: Path) -> Iterator[Callable[..., str]]:
    """Starts mirrors with faults: `start_mirror("--drop-after", "50000", "--no-range")` gives the address.

    `folder=` serves another folder than the shared one. All are stopped when the test ends.
    """
    with ExitStack() as running:

        def start(*options: str, folder: Path | None = None) -> str:
            script = shared / "serve_mirror.py"
            return running.enter_context(_serving(script, folder or shared / "mirror", *options))

        yield start


@pytest.fixture
def fast_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is tried again is tried again at once."""
    monkeypatch.setattr("tenacity.nap.time.sleep", lambda _: None)


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """Address of an S3 on the loopback; one for all tests."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    try:
        yield "http://{}:{}".format(*server.get_host_and_port())
    finally:
        server.stop()


@pytest.fixture
def s3(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A boto3 client of an empty S3 on the loopback, which the environment points at while the test runs."""
    import boto3
    import requests

    requests.post(f"{s3_server}/moto-api/reset", timeout=30).raise_for_status()
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    yield boto3.client("s3", region_name="us-east-1")
