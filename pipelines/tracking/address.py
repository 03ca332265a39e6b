"""Where MLflow is: `registry.tracking_uri` of params.yaml, else MLFLOW_TRACKING_URI, else a sqlite file beside it."""

from __future__ import annotations

import contextlib
import logging
import os
from pathlib import Path

import requests
from mlflow import MlflowClient

from cigpose.config import Config
from cigpose.files.addresses import without_credentials
from pipelines.access import read_pages
from pipelines.lineage import project_root
from pipelines.tracking.database import database_path, prepared

KNOCK_S = 4.0
"""Seconds that a server may take to take a connection, and again to answer."""


class UnreachableError(OSError):
    """An MLflow server that does not answer."""


def tracking_address(config: Config, root: Path | None = None) -> str:
    """The address of MLflow for this experiment; a relative sqlite path is taken from the project's folder."""
    root = root or project_root()
    address = config.registry.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{root}/mlflow.db"
    path = address.removeprefix("sqlite:///")
    if path != address and not path.startswith("/"):
        address = f"sqlite:///{root / path}"
    return address


def artifact_folder(address: str, root: Path | None = None) -> str | None:
    """Where a new experiment keeps its files: `mlartifacts` beside a sqlite file; a server decides for itself."""
    return ((root or project_root()) / "mlartifacts").as_uri() if address.startswith("sqlite:") else None


def connect(address: str) -> MlflowClient:
    """A client of MLflow; a new sqlite file is set up by one process alone, whole or not at all.

    Raises:
        DatabaseError: the sqlite file is not a whole database.
        UnreachableError: the server does not answer; known within some seconds, without MLflow's own patience.
        MlflowException: it answers with an error.
    """
    if address.startswith("http"):
        _knock(address)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)
    path = database_path(address)
    with prepared(path) if path else contextlib.nullcontext():
        client = MlflowClient(tracking_uri=address, registry_uri=address)
        client.search_experiments(max_results=1)
    return client


def _knock(address: str) -> None:
    """Raise UnreachableError unless someone speaks HTTP at an address; what is said does not matter."""
    try:
        requests.get(f"{address.rstrip('/')}/health", timeout=KNOCK_S, allow_redirects=False, stream=True).close()
    except requests.RequestException as err:
        place = without_credentials(address)
        raise UnreachableError(f"MLflow at {place} does not answer ({type(err).__name__}).") from err


def be_impatient(timeout_s: float = 5.0) -> None:
    """Let MLflow's client give up soon where the environment does not say else: it would try for minutes."""
    for name, value in (("TIMEOUT", f"{timeout_s:g}"), ("MAX_RETRIES", "1"), ("BACKOFF_FACTOR", "1")):
        os.environ.setdefault(f"MLFLOW_HTTP_REQUEST_{name}", value)
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # it tells of every attempt


def mlflow_page(address: str) -> str:
    """Where people look at MLflow: its server, or for sqlite the page of `make ui`, at the port it took last."""
    if address.startswith("http"):
        return without_credentials(address).rstrip("/")
    asked = os.environ.get("MLFLOW_PORT")
    return (not asked and read_pages(project_root()).mlflow) or f"http://127.0.0.1:{asked or 5000}"


def run_url(address: str, experiment_id: str, run_id: str) -> str:
    """The page of a run; for sqlite the one that `make ui` serves. MLflow shows its GenAI side unless told else."""
    base = mlflow_page(address)
    return f"{base}/#/experiments/{experiment_id}/runs/{run_id}?workflowType=machine_learning"
