"""Who may ask the Prefect servers of this project to run something: whoever can read `.prefect/token`.

A deployment runs commands, and a page in the user's browser can reach every port of loopback. So our servers answer
nothing but their health without the token; a page of another origin neither gets leave from CORS nor has the CSRF
token; and a page whose host name was pointed at 127.0.0.1 (Prefect does not look at the Host header) has no token.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import requests

from cigpose.files.addresses import without_credentials
from cigpose.files.atomic import claimed, write_json, written_file

HEALTH_TIMEOUT_S = 2.0
TOKEN = "PREFECT_SERVER_API_AUTH_STRING"
"""In the environment of a server that demands one."""
SERVING = "Deployments:"
"""How the line begins that the process that serves deployments prints when it does."""
NO_ORIGIN = "https://none.invalid"  # Prefect takes an empty list for its default, which is every origin


def prefect_home(root: Path) -> Path:
    """Where Prefect keeps its database and settings: `.prefect` of the project, unless PREFECT_HOME says else."""
    return Path(os.environ.setdefault("PREFECT_HOME", str(root / ".prefect")))


def address_note(root: Path) -> Path:
    """The file with the address of the server of `make ui`, there while it runs."""
    return prefect_home(root) / "api_url"


@dataclass(frozen=True, kw_only=True)
class Pages:
    """Where `make ui` has its pages, or had them when it ran last."""

    prefect: str = ""
    mlflow: str = ""


def read_pages(root: Path) -> Pages:
    """The pages of the last `make ui` of a project; without addresses before the first."""
    with contextlib.suppress(OSError, ValueError, TypeError):
        return Pages(**json.loads(_pages_note(root).read_text(encoding="utf-8")))
    return Pages()


def write_pages(root: Path, pages: Pages) -> None:
    """Note where the pages are; the next `make ui` takes the same ports, so that links go on to work."""
    write_json(_pages_note(root), {name: without_credentials(url) for name, url in asdict(pages).items()})


def _pages_note(root: Path) -> Path:
    return Path(os.environ.get("PREFECT_HOME") or root / ".prefect") / "pages.json"


def server_token(root: Path) -> str:
    """The project's token, made when it is asked for first; its file is its owner's alone.

    Raises:
        PermissionError: others can read it.
    """
    path = prefect_home(root) / "token"
    with claimed(path.with_name("token.lock"), "Making Prefect's token", wait=True):
        if not path.is_file():
            with written_file(path) as part:
                part.chmod(0o600)
                part.write_text(secrets.token_urlsafe(24), encoding="ascii")
    if path.stat().st_mode & 0o077:
        raise PermissionError(f"{path}: others on this machine can read the token. Delete it; a new one is made.")
    return path.read_text(encoding="ascii").strip()


def guarded_server(root: Path, origins: tuple[str, ...] = ()) -> dict[str, str]:
    """Environment of a Prefect server that obeys this project only, and of its clients.

    Args:
        root: folder of params.yaml.
        origins: addresses whose pages may use it: its own interface.
    """
    token = server_token(root)
    return {
        TOKEN: token,
        "PREFECT_API_AUTH_STRING": token,
        "PREFECT_SERVER_CSRF_PROTECTION_ENABLED": "true",
        "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": ",".join(origins) or NO_ORIGIN,
    }


def server_to_use(root: Path) -> dict[str, str]:
    """Settings for a client: the server that PREFECT_API_URL names, else that of `make ui` if it is up, else its own.

    A server of its own is a temporary one; it is guarded like the others, for a training takes days.
    """
    note = address_note(root)
    own = note.read_text(encoding="utf-8").strip() if note.is_file() else None
    asked = os.environ.get("PREFECT_API_URL")
    if asked not in (None, own):
        return {}
    if asked is None and (own is None or not _is_up(own)):
        return guarded_server(root)
    return {"PREFECT_API_URL": str(own), "PREFECT_API_AUTH_STRING": server_token(root)}


@contextlib.contextmanager
def using_server(root: Path) -> Iterator[None]:
    """Let Prefect's clients in this process use the server to use; a temporary one ends with the process.

    Ctrl-C reaches everything in the terminal's group. A temporary server that ended with it could not be told how the
    flow ends, which would ask for it for minutes. So it is born with SIGINT blocked.
    """
    from prefect import get_client, settings  # late: it reads PREFECT_HOME, and not everyone who is here needs it

    chosen = {getattr(settings, name): value for name, value in server_to_use(root).items()}
    with settings.temporary_settings(chosen):
        if not settings.PREFECT_API_URL.value():
            before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:
                get_client(sync_client=True)  # starts it
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
        yield


def _is_up(address: str) -> bool:
    try:
        return requests.get(f"{address}/health", timeout=HEALTH_TIMEOUT_S).ok
    except requests.RequestException:
        return False
