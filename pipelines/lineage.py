"""Where a result comes from: git revision, dvc.lock, hashes of shards and files."""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import fsspec
import yaml


def project_root(start: Path | None = None) -> Path:
    """The folder of params.yaml: the working directory, or the checkout behind a `dvc exp run --temp` copy.

    Experiments in a temporary copy must not leave their database in it, since DVC deletes the copy.
    """
    folder = (start or Path.cwd()).resolve()
    parts = folder.parts
    for i in range(len(parts) - 2):
        if parts[i : i + 3] == (".dvc", "tmp", "exps"):
            return Path(*parts[:i])
    return folder


def git_revision(folder: Path | None = None) -> str | None:
    """Commit of the checkout, with `+changes` when tracked files differ from it; None outside git."""
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{commit}+changes" if changed else commit


def _git(folder: Path | None, *arguments: str) -> str:
    command = ["git", "-C", str(folder or Path.cwd()), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=30).stdout.strip()


def file_sha256(path: Path) -> str:
    """Hex sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_of(value: Any) -> str:
    """First 16 hex digits of the sha256 of plain values; the order of keys does not matter."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def dvc_hashes(lock: Path) -> dict[str, str]:
    """Path -> md5 of every output that dvc.lock knows; empty without a dvc.lock."""
    if not lock.is_file():
        return {}
    stages = (yaml.safe_load(lock.read_text(encoding="utf-8")) or {}).get("stages", {})
    outs = (out for stage in stages.values() for out in stage.get("outs", ()))
    return {out["path"]: out["md5"] for out in outs if "md5" in out}


def read_shard_index(location: str | Path) -> dict[str, Any]:
    """The index.json of a set of shards in a folder or at an fsspec address.

    Raises:
        FileNotFoundError: there is none.
    """
    address = f"{str(location).rstrip('/')}/index.json"
    try:
        with fsspec.open(address, "r", encoding="utf-8") as file:
            return json.load(file)
    except FileNotFoundError as err:
        raise FileNotFoundError(f"{address}: not found. `dvc repro shard` writes the shards and their index.") from err


def shards_digest(index: Mapping[str, Any]) -> str:
    """16 hex digits that name the exact bytes of a set of shards."""
    return digest_of([shard["sha256"] for shard in index["shards"]])


def content_digest(index: Mapping[str, Any]) -> str:
    """16 hex digits that name the people in a set of shards, however they are cut into shards.

    Two sets made of the same source files with the same counts are the same evaluation set even when their shards
    differ in size. An index that names no sources is identified by its shards.
    """
    if not index.get("sources"):
        return shards_digest(index)
    counts = {name: index.get(name) for name in ("dataset", "keypoints", "images", "persons", "detections")}
    return digest_of({"sources": index["sources"], **counts})
