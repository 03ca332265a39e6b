"""Where a result comes from: git revision, dvc.lock, digests of shards."""

from __future__ import annotations

import hashlib
import json
import subprocess
from pathlib import Path
from typing import Any

import yaml

from cigpose.config import Config
from cigpose.shard.index import ShardIndex, read_index


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


def shards_digest(index: ShardIndex) -> str:
    """16 hex digits that name the exact bytes of a set of shards."""
    return digest_of([shard.sha256 for shard in index.shards])


def content_digest(index: ShardIndex) -> str:
    """16 hex digits that name the people in a set of shards, however they are cut into shards.

    Two sets made of the same source files with the same counts are the same evaluation set even when their shards
    differ in size. An index that names no sources is identified by its shards.
    """
    if not index.sources:
        return shards_digest(index)
    counts = {name: getattr(index, name) for name in ("dataset", "keypoints", "images", "persons", "detections")}
    return digest_of({"sources": index.sources, **counts})


def dataset_facts(config: Config, dataset: str, shards: Path) -> dict[str, Any]:
    """What tells one set of people from another, as plain values; `content` names the people.

    Args:
        config: says which datasets lie elsewhere.
        dataset: its name.
        shards: folder of the shard folders, in a project whose dvc.lock may know them.

    Raises:
        FileNotFoundError: shards without an index.
    """
    elsewhere = config.data.locations.get(dataset)
    index = read_index(elsewhere or str(shards / dataset))
    hashes = {} if elsewhere else dvc_hashes(shards.parents[1] / "dvc.lock")
    return {
        "content": content_digest(index),
        "shards": shards_digest(index),
        "dvc_md5": hashes.get(f"data/shards/{dataset}"),
        "sources": index.sources,
        **{count: getattr(index, count) for count in ("images", "persons", "detections")},
    }
