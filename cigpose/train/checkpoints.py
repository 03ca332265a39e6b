"""Where training states are kept: a local folder or an s3:// address.

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

import errno
import json
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from cigpose.files.addresses import is_remote, without_credentials
from cigpose.files.atomic import clear_leftovers, replace_folder, sync
from cigpose.files.digest import sha256_of
from cigpose.files.errors import FetchError, TemporaryFetchError
from cigpose.files.objects import (
    fetch_object,
    local_path,
    names_in,
    put_object,
    read_object,
    remove_object,
    size_of,
)

STATE, VALUES, MANIFEST = "state.safetensors", "state.json", "complete.json"
_LARGEST_MANIFEST = 1 << 20
_LARGEST_FILE = 1 << 40


class CheckpointError(RuntimeError):
    """A training state that cannot be written or read."""


class CheckpointStore:
    """The checkpoints of one run.

    Args:
        address: folder, or `s3://bucket/run` (AWS_ENDPOINT_URL names another server than Amazon's).
        keep: number of newest checkpoints that remain.

    Raises:
        CheckpointError: nothing can be written at such an address.
    """

    def __init__(self, address: str | Path, keep: int = 2) -> None:
        self.address = str(address).rstrip("/")
        self.keep = max(1, keep)
        self._folder = None if self.address.startswith("s3://") else _local_folder(self.address)

    def names(self) -> list[str]:
        """Names of the whole checkpoints, oldest first."""
        return sorted(
            name for name in names_in(self.address) if re.fullmatch(r"step-\d+", name) and self._is_whole(name)
        )

    def save(self, step: int, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> str:
        """Write the checkpoint of a step, then drop the oldest beyond `keep`.

        Args:
            step: optimiser steps done.
            tensors: what goes to safetensors.
            values: what goes to json. Files of `save_weights` that it names, as `weights` and as `weights` of
                `unscored`, are kept along.

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
            manifest = {"files": files, "weights": _named_weights(values)}
            (folder / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")

        self._publish(name, write, order=(STATE, VALUES, MANIFEST))
        self._prune()
        return name

    def save_weights(self, step: int, write: Callable[[Path], None]) -> str:
        """Keep a file of weights beside the checkpoints, for as long as one of them names it.

        Args:
            step: optimiser steps done.
            write: writes the file to the path that it gets.

        Returns: the file's name (`weights_name`), to be put into the values of the next checkpoint.
        """
        name = weights_name(step)
        self._publish(name, write, order=None)
        return name

    def fetch(self, name: str, target: Path) -> None:
        """Copy the file `name` of this store to the local path `target`, whole or not at all.

        Raises:
            FileNotFoundError: there is no such file.
        """
        fetch_object(self._at(name), target, _LARGEST_FILE)

    def load(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors (on the CPU) and values of a checkpoint.

        Raises:
            CheckpointError: a file is missing, or does not have the size and sha256 that the manifest states.
        """
        for file in (STATE, VALUES):
            if size_of(self._at(name, file)) is None:
                raise CheckpointError(f"{self.address}/{name}: {file} is missing, though {MANIFEST} is there.")
        with tempfile.TemporaryDirectory(prefix="cigpose-") as scratch:
            folder = self._folder / name if self._folder else Path(scratch)
            if not self._folder:
                for file in (STATE, VALUES, MANIFEST):
                    fetch_object(self._at(name, file), folder / file, _LARGEST_FILE)
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
            FetchError: the server does not answer.
        """
        names = self.names()
        faults: list[str] = []
        published = [name for name in self._published() if name >= max(names, default="")]
        for name in sorted({*names, *published}, reverse=True):
            try:
                return name, *self.load(name)
            except TemporaryFetchError:
                raise
            except (CheckpointError, OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError) as err:
                message = f"{self.address}/{name} is damaged and passed over: {err}"
                warnings.warn(without_credentials(message), stacklevel=2)
                faults.append(f"{name}: {err}")
        if faults:
            raise CheckpointError(
                f"{self.address}: all {len(faults)} checkpoints are damaged ({faults[0]}). Copy one back from where it "
                "is whole; --restart begins anew."
            )
        return None

    def clear_halves(self) -> None:
        """Remove what a killed process wrote half, or was yet to remove; only for the one who has the run to itself."""
        for name in names_in(self.address):
            if self._folder and (aside := re.fullmatch(r"\.(step-\d+)\.\w{8}\.old", name)):
                clear_leftovers(self._folder / aside[1])  # comes back if nothing has taken its place
                continue
            is_half = re.fullmatch(r"step-\d+", name) and size_of(self._at(name, MANIFEST)) is None
            if is_half or re.match(r"\.(step|weights)-.*\.partial-", name):
                self._remove(name)
        try:
            named = self._named_by(self._published())
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return  # of a damaged one nobody knows what it names
        for name in names_in(self.address):
            if re.fullmatch(r"weights-\d+\.safetensors", name) and name not in named:
                self._remove(name)

    def clear(self) -> None:
        """Remove every checkpoint, whole or not, and their weights."""
        for name in names_in(self.address):
            if re.fullmatch(r"\.?(step-\d+|weights-\d+\.safetensors)(\.partial-\w+|\.\w+\.old)?", name):
                self._remove(name)

    def _at(self, *names: str) -> str:
        """The address of a file or folder of this store."""
        return "/".join((self.address, *names))

    def _published(self) -> list[str]:
        """Names of the checkpoints that were whole once: those with a manifest."""
        steps = (name for name in names_in(self.address) if re.fullmatch(r"step-\d+", name))
        return [name for name in steps if size_of(self._at(name, MANIFEST)) is not None]

    def _is_whole(self, name: str) -> bool:
        try:
            files = self._manifest(name)["files"]
            return all(size_of(self._at(name, file)) == facts["bytes"] for file, facts in files.items())
        except TemporaryFetchError:
            raise  # nothing is known about it, which must not look like a training that has not begun
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return False

    def _manifest(self, name: str) -> dict[str, Any]:
        return json.loads(read_object(self._at(name, MANIFEST), _LARGEST_MANIFEST))

    def _publish(self, name: str, write: Callable[[Path], None], order: tuple[str, ...] | None) -> None:
        """Let `write` make the file `name`, or (with `order`) the folder and its files, visible only when whole."""
        scratch = None
        try:
            if self._folder:
                self._folder.mkdir(parents=True, exist_ok=True)
            scratch = Path(tempfile.mkdtemp(prefix=f".{name}.partial-", dir=self._folder))
            made = scratch if order else scratch / name
            write(made)
            if self._folder:
                _publish_locally(made, self._folder / name)
            else:
                for file in order or (name,):
                    put_object(scratch / file, self._at(name, file) if order else self._at(name))
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
        named = self._named_by(kept)
        for name in names_in(self.address):
            is_old = re.fullmatch(r"step-\d+", name) and name < kept[0]
            is_unnamed = re.fullmatch(r"weights-\d+\.safetensors", name) and name not in named
            if is_old or is_unnamed or re.match(r"\.(step|weights)-.*(\.partial-|\.old$)", name):
                self._remove(name)

    def _named_by(self, names: list[str]) -> set[str]:
        """The files of weights that checkpoints name."""
        return {file for name in names for file in _as_list(self._manifest(name)["weights"])}

    def _remove(self, name: str) -> None:
        """Remove a checkpoint or file; the manifest first, so that half a removal leaves what does not exist."""
        remove_object(self._at(name, MANIFEST))
        remove_object(self._at(name))


def weights_name(step: int) -> str:
    """Name of the file that `CheckpointStore.save_weights` writes."""
    return f"weights-{step:09d}.safetensors"


def _named_weights(values: Mapping[str, Any]) -> list[str]:
    unscored = values.get("unscored") or {}
    return [name for name in (values.get("weights"), unscored.get("weights")) if name is not None]


def _as_list(weights: list[str] | str | None) -> list[str]:
    """The files that a manifest names; those of earlier versions name one or none."""
    return [weights] if isinstance(weights, str) else weights or []


def _publish_locally(made: Path, target: Path) -> None:
    for path in [*made.iterdir(), made] if made.is_dir() else [made]:
        sync(path)
    if target.is_dir():  # the same step again, after a resume
        replace_folder(made, target)
    else:
        os.replace(made, target)
        sync(target.parent)


def _facts(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


def _local_folder(address: str) -> Path:
    try:
        if is_remote(address):
            raise FetchError(f"{without_credentials(address)}: can only be read.")
        return local_path(address)
    except FetchError as err:
        raise CheckpointError(f"train.checkpoint.address: {err} Name a folder, or s3://bucket/path.") from err
