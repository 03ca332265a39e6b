"""Shards at s3:// and http(s):// addresses: fetched whole, once, into a cache that processes share.

A cached shard's name is its sha256, so a new version of a dataset never meets an old file, and a file that is there is
whole: it is written under a temporary name, checked, and renamed.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import platformdirs
import requests
import tenacity
import urllib3

from cigpose.files.errors import DataError

CHUNK = 1 << 20
ATTEMPTS = 5
TIMEOUT_S = 30.0
LARGEST_TRUTH = 4 << 30
LEAST_BYTES_PER_S = 1024
"""Of a whole transfer: a server that drips a byte at a time would keep a training waiting for ever."""
S3_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "S3_ENDPOINT_URL")
"""Environment variables that may name another S3 server than Amazon's; the first one set is taken."""


class FetchError(OSError):
    """An address that did not give its file."""


class TemporaryFetchError(FetchError):
    """It may, when asked again."""


def is_remote(address: str) -> bool:
    """Whether an address is not a local path."""
    return address.startswith(("s3://", "http://", "https://"))


def cache_folder(cache: str | None) -> Path:
    """The folder for remote shards: the one given, or the user's cache directory."""
    return Path(cache).expanduser() if cache else Path(platformdirs.user_cache_dir("cigpose")) / "shards"


def read_remote(address: str, largest: int) -> bytes:
    """A remote file of at most `largest` bytes.

    Raises:
        FetchError: the address does not give it, also after several attempts, or gives more.
    """
    return _retry(lambda: b"".join(_chunks(address, largest)))


def cached_shard(address: str, sha256: str, size: int, cache: str | None) -> Path:
    """A local copy of a remote shard.

    Other processes that want the same shard wait for the first one.

    Args:
        address: of the tar.
        sha256: what its content must have.
        size: its bytes.
        cache: folder, or None for the user's cache directory.

    Raises:
        DataError: what the address gives has another sha256.
        FetchError: it gives nothing.
    """
    folder = cache_folder(cache)
    path = folder / f"{sha256}.tar"
    if path.is_file() and path.stat().st_size == size:
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder / f"{sha256}.lock"):
        if not (path.is_file() and path.stat().st_size == size):
            _retry(lambda: _fetch(address, sha256, size, path))
    return path


def _fetch(address: str, sha256: str, size: int, path: Path) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f"{sha256[:12]}-", suffix=".part")
    digest = hashlib.sha256()
    try:
        with os.fdopen(handle, "wb") as file:
            for chunk in _chunks(address, size):
                digest.update(chunk)
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        if digest.hexdigest() != sha256:
            raise DataError(
                f"{address}: sha256 is {digest.hexdigest()[:12]}..., index.json says {sha256[:12]}.... The index and"
                " the shards there are of different versions: upload the dataset's folder again."
            )
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _retry(fetch: Any) -> Any:
    return tenacity.Retrying(
        retry=tenacity.retry_if_exception_type(TemporaryFetchError),
        stop=tenacity.stop_after_attempt(ATTEMPTS),
        wait=tenacity.wait_exponential(multiplier=0.5, max=20),
        reraise=True,
    )(fetch)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Alone among processes; a killed process gives the lock back."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _chunks(address: str, largest: int) -> Iterator[bytes]:
    """The bytes of an address, which may be no more than `largest` and must not drip."""
    begin, received = time.monotonic(), 0
    for chunk in _s3_chunks(address) if address.startswith("s3://") else _http_chunks(address):
        received += len(chunk)
        if received > largest:
            raise FetchError(
                f"{address}: gives more than {largest} bytes, which is all that it may. Correct the server."
            )
        yield chunk
        seconds = time.monotonic() - begin
        if seconds > TIMEOUT_S and received < LEAST_BYTES_PER_S * seconds:
            raise TemporaryFetchError(
                f"{address}: {received} bytes in {seconds:.0f} s, too slow to be waited for, {ATTEMPTS} times."
            )


def _http_chunks(address: str) -> Iterator[bytes]:
    try:
        with closing(
            requests.get(address, stream=True, timeout=TIMEOUT_S, headers={"Accept-Encoding": "identity"})
        ) as answer:
            if answer.status_code >= 500 or answer.status_code in (408, 425, 429):
                raise TemporaryFetchError(f"{address}: HTTP {answer.status_code}, {ATTEMPTS} times. Try again later.")
            if answer.status_code != 200:
                raise FetchError(f"{address}: HTTP {answer.status_code}. Correct data.locations in params.yaml.")
            length, received = answer.headers.get("Content-Length"), 0
            # Not iter_content: it waits until a whole chunk is there, for ever where bytes drip.
            while chunk := answer.raw.read1(CHUNK, decode_content=False):
                received += len(chunk)
                yield chunk
            if length is not None and received != int(length):
                raise TemporaryFetchError(f"{address}: broke off after {received} of {length} bytes, {ATTEMPTS} times.")
    except (requests.RequestException, urllib3.exceptions.HTTPError) as err:
        raise TemporaryFetchError(f"{address}: not reached ({type(err).__name__}), {ATTEMPTS} times.") from err


def _s3_chunks(address: str) -> Iterator[bytes]:
    try:
        # One request per buffer; without it one per read.
        with _s3(os.getpid()).open_input_stream(address.removeprefix("s3://"), buffer_size=8 << 20) as stream:
            while chunk := stream.read(8 << 20):
                yield chunk
    except FileNotFoundError as err:
        raise FetchError(f"{address}: not found. Correct data.locations in params.yaml.") from err
    except OSError as err:
        raise TemporaryFetchError(f"{address}: not read, {ATTEMPTS} times: {err}") from err


@functools.lru_cache(maxsize=1)
def _s3(process: int) -> Any:
    """The S3 client of a process: one must not outlive a fork."""
    from pyarrow import fs  # slow to import, and needed by few

    options: dict[str, Any] = {"connect_timeout": TIMEOUT_S, "request_timeout": TIMEOUT_S}
    endpoint = next((os.environ[name] for name in S3_ENDPOINTS if os.environ.get(name)), None)
    if endpoint:
        scheme, _, host = endpoint.rpartition("://")
        options |= {"scheme": scheme or "https", "endpoint_override": host}
        options["region"] = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
    return fs.S3FileSystem(**options)
