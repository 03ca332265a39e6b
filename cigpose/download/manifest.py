"""manifest.json of a raw folder, and the same of a mirror: which files, with which digests.

The raw folder's is a function of the files alone: no dates, no hosts of the day, so that its own hash (DVC's) holds.

    {"format": 1, "files": [{"file": "val2017.zip", "bytes": 815585330, "sha256": "4f7e...", "published": true,
                             "url": "http://images.cocodataset.org/zips/val2017.zip", "licence": "..."}]}

`published` says whether the bytes are the ones their authors published: null where no digest is published.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import urlsplit

from cigpose.download.drive import drive_id, is_drive
from cigpose.download.http import Patience, TransferError, get_text
from cigpose.download.integrity import Digests, Expected
from cigpose.download.sources import SourceFile
from cigpose.files.atomic import clear_leftovers, write_text

MANIFEST = "manifest.json"
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One file of a raw folder."""

    file: str
    bytes: int
    sha256: str
    published: bool | None
    url: str
    licence: str


def entry_of(source: SourceFile, digests: Digests) -> Entry:
    """What the manifest says of a file with these digests."""
    return Entry(
        file=source.name,
        bytes=digests.bytes,
        sha256=digests.sha256,
        published=None if source.sha256 is None else digests.sha256 == source.sha256,
        url=source.origin,
        licence=source.licence,
    )


def write_manifest(folder: Path, entries: Iterable[Entry]) -> None:
    """Write manifest.json, at once or not at all, and only if it says something new; for the folder's one download."""
    files = [asdict(entry) for entry in sorted(entries, key=lambda entry: entry.file)]
    text = json.dumps({"format": 1, "files": files}, indent=1) + "\n"
    target = folder / MANIFEST
    clear_leftovers(target)
    if not target.is_file() or target.read_text(encoding="utf-8") != text:
        write_text(target, text)


def read_manifest(folder: Path) -> dict[str, Entry]:
    """What was recorded at earlier downloads, by file; empty without a manifest.

    Raises:
        ValueError: the manifest cannot be read.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return {}
    try:
        return {item["file"]: Entry(**item) for item in json.loads(path.read_text(encoding="utf-8"))["files"]}
    except (ValueError, TypeError, KeyError) as err:
        raise ValueError(
            f"{path}: not a manifest of ours ({err}). Delete it; the files will be recorded anew."
        ) from err


@dataclass(frozen=True, kw_only=True, slots=True)
class MirrorIndex:
    """What a mirror says of its files. It is the authority for them: whoever names a mirror in params trusts it."""

    address: str
    files: Mapping[str, Expected]
    """`<host>/<path>` -> what it says; a Google Drive file is `drive.google.com/file/d/<id>/<name>`."""

    def expected(self, url: str) -> Expected | None:
        """What it says of the file at a public address, if anything."""
        if is_drive(url):
            prefix = f"drive.google.com/file/d/{drive_id(url)}/"
            return next((found for path, found in self.files.items() if path.startswith(prefix)), None)
        parts = urlsplit(url)
        return self.files.get(f"{parts.netloc}{parts.path}")


def read_mirror_index(mirror: str, patience: Patience, on_wait: Callable[[str, float], None]) -> MirrorIndex | None:
    """The manifest.json at a mirror's root, else its SHA256SUMS, else None.

    Args:
        mirror: address.
        patience: time-outs and attempts.
        on_wait: called with (reason, seconds) before a wait.

    Raises:
        ValueError: the mirror does not answer, or its index cannot be read.
    """
    address = f"{mirror}/{MANIFEST}"
    try:
        text = get_text(address, patience, on_wait)
        if text is not None:
            return MirrorIndex(address=address, files=_from_json(text, address))
        address = f"{mirror}/SHA256SUMS"
        text = get_text(address, patience, on_wait)
    except TransferError as err:
        raise ValueError(f"data.download.mirror {mirror}: {err}. Is it running, and the address right?") from err
    except (ValueError, TypeError, KeyError) as err:
        raise ValueError(
            f"{address}: expected a JSON list of {{path, bytes, sha256}} ({err}). Mend the mirror's manifest."
        ) from err
    if text is None:
        return None
    lines = (line.split(maxsplit=1) for line in text.splitlines() if line.strip())
    pairs = [(pair[0].lower(), pair[-1].lstrip("*").removeprefix("./").strip()) for pair in lines]
    if not all(_SHA256.fullmatch(digest) for digest, _ in pairs):
        raise ValueError(f"{address}: expected lines of `<sha256>  <path>`. Write it with sha256sum.")
    return MirrorIndex(address=address, files={path: Expected(sha256=d, authority=address) for d, path in pairs})


def _from_json(text: str, address: str) -> dict[str, Expected]:
    files = {}
    for item in json.loads(text):
        if not _SHA256.fullmatch(item["sha256"]):
            raise ValueError(f"sha256 of {item['path']} is {item['sha256']!r}")
        files[item["path"]] = Expected(bytes=int(item["bytes"]), sha256=item["sha256"], authority=address)
    return files
