"""Digests of files and folders."""

from __future__ import annotations

import hashlib
from pathlib import Path

from cigpose.files.archives import list_members


def sha256_of(path: Path) -> str:
    """Hex digest of a file; of a folder, that of the lines `<sha256>  <name>` of its files, sorted by name."""
    if path.is_dir():
        digest = hashlib.sha256()
        for name, extent in list_members(path).items():
            digest.update(f"{sha256_of(Path(extent.path))}  {name}\n".encode(errors="surrogateescape"))
        return digest.hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
