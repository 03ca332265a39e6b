"""Where training states are kept: a local folder or any fsspec address.

    <address>/
        step-000001200/
            state.safetensors   tensors
            state.json          everything else
            complete.json       size and sha256 of the two; written last
        weights-000001000.safetensors

A checkpoint without complete.json does not exist: a half-written one is never picked. One whose files are not what its
complete.json says was damaged later, and is passed over with a warning; where no other is left, nothing starts anew by
itself. On a local disk a checkpoint is also written under another name and renamed when whole.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import fsspec
import safetensors
import safetensors.torch
from torch import Tensor

from cigpose.files.addresses import without_credentials
from cigpose.files.atomic import replace_folder, sync
from cigpose.files.objects import S3_ENDPOINTS

STATE, VALUES, MANIFEST = "state.safetensors", "state.json", "complete.json"


class CheckpointError(RuntimeError):
    """A training state that cannot be written or read."""


class CheckpointStore:
    """The checkpoints of one run.

    Args:
        address: folder or fsspec address (`s3://bucket/run`; AWS_ENDPOINT_URL names another server than Amazon's).
        keep: number of newest checkpoints that remain.
    """

    def __init__(self, address: str | Path, keep: int = 2) -> None:
        self.address = str(address).rstrip("/")
        self.keep = max(1, keep)
        self._files, self._root = _filesystem(self.address)
        self._is_local = "file" in _protocols(self._files)

    def names(self) -> list[str]:
        """Names of the whole checkpoints, oldest first."""
        return sorted(name for name in self._entries() if re.fullmatch(r"step-\d+", name) and self._is_whole(name))

    def save(self, step: int, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> str:
        """Write the checkpoint of a step, then drop the oldest beyond `keep`.

        Args:
            step: optimiser steps done.
            tensors: what goes to safetensors.
            values: what goes to json. `values["weights"]`, if any, names a file of `save_weights` to be kept along.

        Returns: the checkpoint's name.

        Raises:
            CheckpointError: the disk is full or not writable. Earlier checkpoints are untouched.
        """
        name = f"step-{step:09d}"

        def write(folder: Path) -> None:
            contiguous = {key: tensor.detach().contiguous() for key, tensor in tensors.items()}
            safetensors.torch.save_file(contiguous, folder / STATE)
            (folder / VALUES).write_text(json.dumps(values), encoding="utf-8")
            files = {file: _facts(folder / file) for file in (STATE, VALUES)}
            manifest = {"files": files, "weights": values.get("weights")}
            (folder / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")

        self._publish(name, write, order=(STATE, VALUES, MANIFEST))
        self._prune()
        return name

    def save_weights(self, step: int, write: Callable[[Path], None]) -> str:
        """Keep a file of weights beside the checkpoints, for as long as one of them names it.

        Args:
            step: optimiser steps done.
            write: writes the file to the path that it gets.

        Returns: the file's name, to be put under `weights` in the values of the next checkpoint.
        """
        name = f"weights-{step:09d}.safetensors"
        self._publish(name, write, order=None)
        return name

    def fetch(self, name: str, target: Path) -> None:
        """Copy the file `name` of this store to the local path `target`, atomically."""
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.partial")
        self._files.get_file(f"{self._root}/{name}", str(partial))
        os.replace(partial, target)

    def load(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors (on the CPU) and values of a checkpoint.

        Raises:
            CheckpointError: a file is missing, or does not have the size and sha256 that the manifest states.
        """
        for file in (STATE, VALUES):
            if not self._files.exists(f"{self._root}/{name}/{file}"):
                raise CheckpointError(f"{self.address}/{name}: {file} is missing, though {MANIFEST} is there.")
        with tempfile.TemporaryDirectory(prefix="cigpose-") as scratch:
            folder = Path(self._root) / name
            if not self._is_local:
                folder = Path(scratch)
                for file in (STATE, VALUES, MANIFEST):
                    self._files.get_file(f"{self._root}/{name}/{file}", str(folder / file))
            manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            for file, expected in manifest["files"].items():
                if (found := _facts(folder / file)) != expected:
                    raise CheckpointError(f"{self.address}/{name}/{file}: is {found}, {MANIFEST} says {expected}.")
            tensors = safetensors.torch.load_file(folder / STATE)
            return tensors, json.loads((folder / VALUES).read_text(encoding="utf-8"))

    def load_newest(self) -> tuple[str, dict[str, Tensor], dict[str, Any]] | None:
        """Name, tensors and values of the newest checkpoint that is not damaged; None if there is none at all.

        Raises:
            CheckpointError: there are checkpoints, and all of them are damaged.
        """
        names = self.names()
        faults: list[str] = []
        published = [name for name in self._published() if name >= max(names, default="")]
        for name in sorted({*names, *published}, reverse=True):
            try:
                return name, *self.load(name)
            except (CheckpointError, OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as err:
                message = f"{self.address}/{name} is damaged and passed over: {err}"
                warnings.warn(without_credentials(message), stacklevel=2)
                faults.append(f"{name}: {err}")
        if faults:
            raise CheckpointError(
                f"{self.address}: all {len(faults)} checkpoints are damaged ({faults[0]}). Copy one back from where it "
                "is whole; --restart begins anew."
            )
        return None

    def clear(self) -> None:
        """Remove every checkpoint, whole or not, and their weights."""
        for name in self._entries():
            if re.fullmatch(r"\.?(step-\d+|weights-\d+\.safetensors)(\.partial-\w+|\.\w+\.old)?", name):
                self._remove(name)

    def _entries(self) -> list[str]:
        self._files.invalidate_cache()
        try:
            return [Path(entry).name for entry in self._files.ls(self._root, detail=False)]
        except FileNotFoundError:
            return []

    def _published(self) -> list[str]:
        """Names of the checkpoints that were whole once: those with a manifest."""
        steps = (name for name in self._entries() if re.fullmatch(r"step-\d+", name))
        return [name for name in steps if self._files.exists(f"{self._root}/{name}/{MANIFEST}")]

    def _is_whole(self, name: str) -> bool:
        try:
            files = self._manifest(name)["files"]
            return all(self._files.size(f"{self._root}/{name}/{f}") == facts["bytes"] for f, facts in files.items())
        except (OSError, ValueError, KeyError):
            return False

    def _manifest(self, name: str) -> dict[str, Any]:
        return json.loads(self._files.cat_file(f"{self._root}/{name}/{MANIFEST}"))

    def _publish(self, name: str, write: Callable[[Path], None], order: tuple[str, ...] | None) -> None:
        """Let `write` make the file `name`, or (with `order`) the folder and its files, visible only when whole."""
        scratch = None
        try:
            if self._is_local:
                Path(self._root).mkdir(parents=True, exist_ok=True)
            scratch = Path(tempfile.mkdtemp(prefix=f".{name}.partial-", dir=self._root if self._is_local else None))
            made = scratch if order else scratch / name
            write(made)
            if self._is_local:
                _publish_locally(made, Path(self._root) / name)
            else:
                for file in order or (name,):
                    remote = f"{self._root}/{name}/{file}" if order else f"{self._root}/{name}"
                    self._files.put_file(str(scratch / file), remote)
        except (OSError, safetensors.SafetensorError) as err:
            raise self._explain(err, name) from err
        finally:
            if scratch is not None:
                shutil.rmtree(scratch, ignore_errors=True)

    def _explain(self, err: Exception, name: str) -> CheckpointError:
        if getattr(err, "errno", None) == errno.ENOSPC or "No space left" in str(err):
            return CheckpointError(
                f"{self.address}: the disk is full, checkpoint {name} was not written. Earlier ones are whole: make "
                f"room or lower train.checkpoint.keep ({self.keep}), then run the same command to go on."
            )
        return CheckpointError(f"{self.address}: checkpoint {name} could not be written: {err}")

    def _prune(self) -> None:
        """Drop all but the newest checkpoints, older half-written ones, and weights that no checkpoint names."""
        kept = self.names()[-self.keep :]
        named = {self._manifest(name)["weights"] for name in kept}
        for name in self._entries():
            is_old = re.fullmatch(r"step-\d+", name) and name < kept[0]
            is_unnamed = re.fullmatch(r"weights-\d+\.safetensors", name) and name not in named
            if is_old or is_unnamed or re.match(r"\.(step|weights)-.*(\.partial-|\.old$)", name):
                self._remove(name)

    def _remove(self, name: str) -> None:
        """Remove a checkpoint or file; the manifest first, so that half a removal leaves what does not exist."""
        manifest = f"{self._root}/{name}/{MANIFEST}"
        if self._files.exists(manifest):
            self._files.rm(manifest)
        with contextlib.suppress(FileNotFoundError):  # a folder of an object store goes with its last file
            self._files.rm(f"{self._root}/{name}", recursive=True)


def _publish_locally(made: Path, target: Path) -> None:
    for path in [*made.iterdir(), made] if made.is_dir() else [made]:
        sync(path)
    if target.is_dir():  # the same step again, after a resume
        replace_folder(made, target)
    else:
        os.replace(made, target)
        sync(target.parent)


def _facts(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _protocols(files: fsspec.AbstractFileSystem) -> tuple[str, ...]:
    protocol = files.protocol
    return (protocol,) if isinstance(protocol, str) else tuple(protocol)


def _filesystem(address: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of an address and the path in it. s3:// goes through pyarrow, which needs no further package."""
    if not address.startswith("s3://"):
        files, root = fsspec.core.url_to_fs(address)
        return files, root.rstrip("/")
    import pyarrow.fs
    from fsspec.implementations.arrow import ArrowFSWrapper

    options: dict[str, Any] = {"region": os.environ.get("AWS_REGION", "us-east-1")}
    if endpoint := next((os.environ[name] for name in S3_ENDPOINTS if os.environ.get(name)), None):
        options["scheme"], _, options["endpoint_override"] = endpoint.partition("://")
    return ArrowFSWrapper(pyarrow.fs.S3FileSystem(**options)), address.removeprefix("s3://")
