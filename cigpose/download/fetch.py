"""Downloads data sets into a raw folder: `fetch` makes data/raw/<key> hold the files asked for, and manifest.json.

What is in place is verified and stays; what is not is fetched, several files at a time, each from the first of its
hosts that gives it. Whether a file is right is decided by, in this order:

1. the index at the root of `data.download.mirror` (manifest.json or SHA256SUMS), for the files it lists: whoever names
   a mirror trusts it, and manifest.json tells of each file whether it is also the published one;
2. the published size and digests (`cigpose.download.sources`);
3. what manifest.json in the raw folder recorded at the first download;
4. the structure of its format, read to the end: the line that reports the file says what that proves.

Archives are never unpacked. Bytes on their way are in `.partial/` until they are whole and verified.
"""

from __future__ import annotations

import difflib
import errno
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit

from cigpose.config import DownloadConfig
from cigpose.download.board import Board, human_bytes
from cigpose.download.fetcher import DownloadError, Fetcher, Job
from cigpose.download.http import Patience
from cigpose.download.integrity import Expected, IntegrityError, check_file
from cigpose.download.manifest import (
    MANIFEST,
    Entry,
    MirrorIndex,
    entry_of,
    read_manifest,
    read_mirror_index,
    write_manifest,
)
from cigpose.download.sources import TABLE, SourceFile, drive_url
from cigpose.download.transfer import PartialFile

__all__ = ["PARTIAL", "DownloadError", "fetch"]

PARTIAL = ".partial"
_SPARE_BYTES = 64 << 20  # left free on the disk


def fetch(
    folder: Path,
    names: Sequence[str],
    options: DownloadConfig,
    *,
    table: Mapping[str, SourceFile] = TABLE,
    say: Callable[[str], None] = print,
    first_wait_s: float = 1.0,
) -> list[Entry]:
    """Make a raw folder hold these files, verified, and a manifest.json that names them.

    A killed call leaves whole files in place and the bytes of the others in `.partial/`; the next goes on from there.

    Args:
        folder: where the files go, e.g. data/raw/coco. A link to another disk is fine, and so are links in it.
        names: names in the table. None at all gives a folder with an empty manifest.
        options: mirror, Drive ids, time-outs, files at a time.
        table: what can be downloaded.
        say: takes the lines for the user: sizes and licences before anything is fetched, then what happens.
        first_wait_s: seconds before a second attempt; doubles up to a minute.

    Returns: the manifest's entries, in the order of `names`.

    Raises:
        DownloadError: an unknown name, a missing Drive id, a full disk, a file in place that is not the expected one,
            or files that no host gives as expected (one line each; the others are in place).
    """
    sources = [_look_up(name, table) for name in dict.fromkeys(names)]
    _check_options(options, table)
    patience = Patience(max_attempts=options.max_attempts, timeout_s=options.timeout_s, first_wait_s=first_wait_s)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _alone_in(folder):
            recorded = read_manifest(folder)
            index = _mirror_index(options, patience, say) if sources else None
            jobs = [_plan(source, folder, options, index, recorded) for source in sources]
            missing = [job for job in jobs if not _is_in_place(job)]
            _announce(folder, jobs, missing, index, options, say)
            _check_disk(folder, missing)
            entries = _verify([job for job in jobs if job not in missing])
            pinned = recorded | entries

            def pin(entry: Entry) -> None:
                pinned[entry.file] = entry
                write_manifest(folder, pinned.values())

            entries |= Fetcher(folder / PARTIAL, options, patience, say).run(missing, pin)
            write_manifest(folder, entries.values())
            shutil.rmtree(folder / PARTIAL, ignore_errors=True)
    except DownloadError:
        raise
    except ValueError as err:
        raise DownloadError(str(err)) from err
    except OSError as err:
        raise DownloadError(_disk_sentence(folder, err)) from err
    return [entries[source.name] for source in sources]


def _look_up(name: str, table: Mapping[str, SourceFile]) -> SourceFile:
    if name not in table:
        near = difflib.get_close_matches(name, table, n=1)
        hint = f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(table)}."
        raise DownloadError(f"data.download.sources: {name!r} is not in the download table. {hint}")
    return table[name]


def _check_options(options: DownloadConfig, table: Mapping[str, SourceFile]) -> None:
    if options.mirror is not None:
        parts = urlsplit(options.mirror)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise DownloadError(
                f"data.download.mirror: {options.mirror!r} is not an http or https address. "
                "Give one such as http://127.0.0.1:8000, or null for the original hosts."
            )
    for name, drive_id in options.drive_ids.items():
        if name not in table:
            near = difflib.get_close_matches(name, table, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise DownloadError(f"data.download.drive_ids: {name!r} is not in the download table.{hint}")
        if not drive_id or not drive_id.replace("-", "").replace("_", "").isalnum():
            raise DownloadError(
                f"data.download.drive_ids.{name}: {drive_id!r} is not a Google Drive id. "
                "Give the part after /d/ or id= of the link, letters and digits."
            )


def _mirror_index(options: DownloadConfig, patience: Patience, say: Callable[[str], None]) -> MirrorIndex | None:
    if options.mirror is None:
        return None

    def on_wait(reason: str, wait_s: float) -> None:
        say(f"Index of the mirror: {reason}; next attempt in {wait_s:.1f} s")

    return read_mirror_index(options.mirror.rstrip("/"), patience, on_wait)


def _plan(
    source: SourceFile,
    folder: Path,
    options: DownloadConfig,
    index: MirrorIndex | None,
    recorded: Mapping[str, Entry],
) -> Job:
    """Where a file comes from and what it must be."""
    own = (drive_url(options.drive_ids[source.name]),) if source.name in options.drive_ids else ()
    urls = own + source.urls
    expected = next(filter(None, (index.expected(url) for url in urls)), None) if index else None
    if expected is None:
        expected = _published(source)
    if expected.sha256 is None and expected.md5 is None and source.name in recorded:
        before = recorded[source.name]
        expected = Expected(bytes=before.bytes, sha256=before.sha256, authority=f"recorded in {folder / MANIFEST}")
    return Job(source=source, target=folder / source.name, urls=urls, expected=expected)


def _published(source: SourceFile) -> Expected:
    return Expected(bytes=source.bytes, sha256=source.sha256, md5=source.md5)


def _is_in_place(job: Job) -> bool:
    """Whether a file is there (and may be verified); if not, whether it could be fetched."""
    target, name = job.target, job.source.name
    if target.is_dir():
        raise DownloadError(f"{target}: is a folder, expected a file. Move it away.")
    if target.exists():
        return True
    if target.is_symlink():
        raise DownloadError(f"{target}: links to {os.readlink(target)}, which does not exist. Mend or delete the link.")
    unpacked = target.with_suffix("")
    if target.suffix in (".zip", ".tar") and unpacked.is_dir():
        raise DownloadError(
            f"{target}: not there, but its unpacked folder {unpacked} is. To use that one, name {unpacked.name} in "
            f"data.datasets in place of {name} and take {name} out of data.download.sources; or move the folder away."
        )
    if not job.urls:
        raise DownloadError(
            f"{name} is handed out personally. Fill the form at {job.source.form} and put the Google Drive id that "
            f"you get into params.yaml as data.download.drive_ids: {{{name}: YOUR-ID}}, or put the file at {target}."
        )
    return False


def _announce(
    folder: Path,
    jobs: Sequence[Job],
    missing: Sequence[Job],
    index: MirrorIndex | None,
    options: DownloadConfig,
    say: Callable[[str], None],
) -> None:
    """Sizes, terms and origin, before anything is fetched."""
    if not jobs:
        say(f"{folder}: nothing to download.")
        return
    unknown = sum(job.size is None for job in missing)
    amount = human_bytes(sum(job.size or 0 for job in missing))
    if unknown:
        amount = f"at least {amount} ({unknown} of unknown size)" if unknown < len(missing) else "of unknown size"
    rest = f"{len(missing)} to fetch, {amount}" if missing else "all in place"
    say(f"{folder}: {len(jobs)} file{'s' if len(jobs) > 1 else ''}, {rest}.")
    if not missing:
        return
    width = max(len(job.source.name) for job in jobs)
    for job in jobs:
        size = human_bytes(job.size) if job.size else "size unknown"
        say(f"  {job.source.name:<{width}}  {size:>12}  {'to fetch' if job in missing else 'in place'}")
    terms: dict[str, list[str]] = {}
    for job in jobs:
        terms.setdefault(job.source.licence, []).append(job.source.name)
    say("Terms of use, which you accept by downloading:")
    for licence, names in terms.items():
        say(f"  {', '.join(names)}: {licence}")
    if options.mirror:
        held = f"sizes and digests as in {index.address}" if index else "it has no index: published digests hold"
        say(f"From the mirror {options.mirror} in place of the original hosts; {held}.")
    other = [job.source.name for job in jobs if job.source.sha256 and job.expected.sha256 != job.source.sha256]
    if other:
        say(f"Note: by the mirror's index these are not the published files: {', '.join(other)}.")


def _check_disk(folder: Path, missing: Sequence[Job]) -> None:
    needed = sum(max(0, (job.size or 0) - PartialFile(folder / PARTIAL / job.source.name).size) for job in missing)
    free = shutil.disk_usage(folder).free
    if needed and needed + _SPARE_BYTES > free:
        raise DownloadError(
            f"{folder}: {human_bytes(needed)} to fetch, but {human_bytes(free)} free on this disk. "
            f"Make room, or make {folder} a link to a folder on a larger disk."
        )


def _verify(jobs: Sequence[Job]) -> dict[str, Entry]:
    """Check the files in place. The published ones are welcome whatever a mirror holds."""
    entries: dict[str, Entry] = {}
    if not jobs:
        return entries
    with Board("verify", [(job.source.name, job.target.stat().st_size) for job in jobs]) as board:
        for job in jobs:
            published = _published(job.source)
            try:
                found = check_file(job.target, job.expected, published, on_bytes=board.adder(job.source.name))
            except IntegrityError as err:
                raise DownloadError(
                    f"{job.target}: {err}. Delete it and run again to fetch it, or put the right file in its place."
                ) from err
            entries[job.source.name] = entry_of(job.source, found)
    return entries


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Hold a lock on a folder, so that two downloads do not write the same partial file."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as err:
            raise DownloadError(f"{folder}: another download is running here. Wait until it ends.") from err
        except OSError:
            pass  # a file system without locks
        try:
            yield
        finally:
            with suppress(OSError):
                (folder / PARTIAL).rmdir()  # stays only where it holds bytes to go on from
    finally:
        os.close(handle)


def _disk_sentence(folder: Path, err: OSError) -> str:
    if err.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{folder}: the disk is full. Make room and run again: it goes on from where it stopped."
    if err.errno in (errno.EEXIST, errno.ENOTDIR):
        return f"{folder}: is not a folder, expected one or a link to one. Move it away."
    return f"{folder}: cannot be written ({err.strerror or err}). Check the folder's owner and mode."
