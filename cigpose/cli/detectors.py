"""`cigpose detectors list` and `cigpose detectors pull`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def add_parser(subparsers: Any) -> None:
    """Add the group."""
    detectors = subparsers.add_parser("detectors", help="person detectors for `cigpose predict`")
    commands = detectors.add_subparsers(title="commands", required=True, metavar="COMMAND")
    listing = commands.add_parser(
        "list", help="which can be pulled", description="List the detectors that can be pulled, and which are here."
    )
    listing.add_argument("--json", action="store_true", help="as JSON")
    listing.set_defaults(run=_list)
    pull = commands.add_parser(
        "pull",
        help="download one",
        description="Download a detector from its authors' release, checked by its published digest, or, where none is "
        "published, by the digest it had at the first download. `cigpose predict --detector NAME` uses it.",
    )
    pull.add_argument("names", nargs="+", metavar="NAME", help="see `cigpose detectors list`")
    pull.add_argument("--mirror", help="address that replaces the hosts: MIRROR/HOST/PATH")
    for command in (listing, pull):
        command.add_argument("--folder", type=Path, help="where they are kept (default: the user's data directory)")
    pull.set_defaults(run=_pull)


def detector_file(name: str, folder: Path | None = None) -> Path:
    """Where a detector of the table is kept, whether or not it is there.

    Args:
        name: of the table.
        folder: of all; None for the user's data directory.

    Raises:
        ValueError: no such detector.
    """
    import platformdirs

    from cigpose.download.detectors import DETECTORS

    if name not in DETECTORS:
        raise ValueError(f"detectors: {name!r} is not in the table. Known: {', '.join(DETECTORS)}.")
    # A folder each: a folder's manifest names the files of one download.
    return (folder or Path(platformdirs.user_data_dir("cigpose")) / "detectors") / name / DETECTORS[name].name


def find_detector(given: str) -> Path:
    """The file that `--detector` means: a path, or the name of one that was pulled.

    Raises:
        FileNotFoundError: neither is there.
    """
    from cigpose.download.detectors import DETECTORS

    path = Path(given)
    if path.exists() or given not in DETECTORS:
        if not path.is_file():
            raise FileNotFoundError(f"{given}: no such detector. Give an ONNX file, or one of {', '.join(DETECTORS)}.")
        return path
    path = detector_file(given)
    if not path.is_file():
        raise FileNotFoundError(f"{given}: not pulled yet. Run `cigpose detectors pull {given}`.")
    return path


def _list(options: argparse.Namespace) -> None:
    from cigpose.download.board import human_bytes
    from cigpose.download.detectors import DETECTORS

    rows = []
    for name, source in DETECTORS.items():
        path = detector_file(name, options.folder)
        size = source.bytes or source.about_bytes
        rows.append(
            {
                "name": name,
                "bytes": source.bytes,
                "sha256": source.sha256,
                "licence": source.licence,
                "url": source.origin,
                "path": str(path) if path.is_file() else None,
                "size": human_bytes(size) if size else "unknown",
            }
        )
    if options.json:
        print(json.dumps([{key: value for key, value in row.items() if key != "size"} for row in rows], indent=1))
        return
    print(f"{'name':<12} {'size':>10}  {'digest':<10} here")
    for row in rows:
        digest = "published" if row["sha256"] else "recorded"
        print(f"{row['name']:<12} {row['size']:>10}  {digest:<10} {row['path'] or '-'}")


def _pull(options: argparse.Namespace) -> None:
    from cigpose.config import DownloadConfig
    from cigpose.download.detectors import DETECTORS
    from cigpose.download.fetch import fetch
    from cigpose.download.sources import table_of

    table, settings = table_of(*DETECTORS.values()), DownloadConfig(sources={}, mirror=options.mirror)
    targets = [detector_file(name, options.folder) for name in options.names]  # refuses what is not in the table
    for target in targets:
        fetch(target.parent, [target.name], settings, table=table)
        print(f"{target}: ready.")
