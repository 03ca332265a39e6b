"""Objects at s3:// addresses. Use `cigpose.files.objects`, which knows every kind of address.

The client is pyarrow's: it comes in one wheel, needs no event loop, and works after a fork. s3fs would hold botocore at
the one version that aiobotocore knows, which is not the one that boto3 asks for. Any server that speaks S3 will do.

A server that falls silent is given up after `TIMEOUT_S`. How slowly it may drip is not bounded, as it is for HTTP: who
names an S3 server in the environment trusts it with keys.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cigpose.files.addresses import without_credentials
from cigpose.files.errors import FetchError, MissingError, TemporaryFetchError

TIMEOUT_S = 30.0
ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "S3_ENDPOINT_URL")
"""Environment variables that may name another S3 server than Amazon's; the first one set is taken."""
_BUFFER = 8 << 20
"""Bytes of a request; without it pyarrow makes one per read."""
_FINAL = re.compile(
    r"AWS Error (ACCESS_DENIED|NO_SUCH_BUCKET|INVALID_ACCESS_KEY_ID|SIGNATURE_DOES_NOT_MATCH|INVALID_SIGNATURE)"
)


def chunks(address: str) -> Iterator[bytes]:
    """The bytes of an object.

    Raises:
        FetchError: it is not there, or not given.
    """
    with _explained(address), _client().open_input_stream(_path(address), buffer_size=_BUFFER) as stream:
        while chunk := stream.read(_BUFFER):
            yield chunk


def names(address: str) -> list[str]:
    """Names of the objects and folders directly below an address; none where nothing is.

    Raises:
        FetchError: the bucket is not there, or not shown.
    """
    from pyarrow import fs

    try:
        with _explained(address):
            return [info.base_name for info in _client().get_file_info(fs.FileSelector(_path(address)))]
    except MissingError:
        return []


def size(address: str) -> int | None:
    """Bytes of an object; None where there is none.

    Raises:
        FetchError: it is not told.
    """
    with _explained(address):
        info = _client().get_file_info(_path(address))
        return info.size if info.is_file else None


def put(path: Path, address: str) -> None:
    """Upload a file. It is there as a whole once this returns, and not at all before.

    Raises:
        FetchError: it is not taken.
    """
    from pyarrow import fs

    with _explained(address):
        fs.copy_files(
            str(path), _path(address), source_filesystem=fs.LocalFileSystem(), destination_filesystem=_client()
        )


def remove(address: str) -> None:
    """Remove an object, or all below an address; nothing where there is none.

    Raises:
        FetchError: it is not allowed.
    """
    from pyarrow import fs

    with _explained(address):
        files, path = _client(), _path(address)
        kind = files.get_file_info(path).type
        if kind == fs.FileType.Directory:
            files.delete_dir(path)
        elif kind == fs.FileType.File:
            files.delete_file(path)


def _path(address: str) -> str:
    path = address.removeprefix("s3://").rstrip("/")
    if "@" in path.partition("/")[0]:
        raise FetchError(
            f"{without_credentials(address)}: an s3:// address holds no keys here. Set AWS_ACCESS_KEY_ID and"
            " AWS_SECRET_ACCESS_KEY, and write s3://bucket/path."
        )
    return path


@contextmanager
def _explained(address: str) -> Iterator[None]:
    """Turn what pyarrow raises into our errors."""
    shown = without_credentials(address)
    try:
        yield
    except FetchError:
        raise
    except FileNotFoundError as err:
        raise MissingError(f"{shown}: not found. Correct the address in params.yaml.") from err
    except OSError as err:
        if found := _FINAL.search(str(err)):
            raise FetchError(
                f"{shown}: the server says {found[1]}. Correct the address in params.yaml, or the AWS_ variables."
            ) from err
        raise TemporaryFetchError(f"{shown}: S3 gives no answer: {err}") from err


def _client() -> Any:
    endpoint = next((os.environ[name] for name in ENDPOINTS if os.environ.get(name)), None)
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    return _client_of(os.getpid(), endpoint, region)


@functools.lru_cache(maxsize=1)
def _client_of(process: int, endpoint: str | None, region: str | None) -> Any:
    """The client of a process: one must not outlive a fork."""
    from pyarrow import fs  # slow to import, and needed by few

    options: dict[str, Any] = {"connect_timeout": TIMEOUT_S, "request_timeout": TIMEOUT_S, "region": region}
    if endpoint:
        scheme, _, host = endpoint.rpartition("://")
        options |= {"scheme": scheme or "https", "endpoint_override": host, "region": region or "us-east-1"}
    return fs.S3FileSystem(**options)
