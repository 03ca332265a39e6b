"""Fetches files, several at a time, each from the first of its hosts that gives it as expected."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import urlsplit

from cigpose.config import DownloadConfig
from cigpose.download.board import Board, human_bytes
from cigpose.download.drive import is_drive
from cigpose.download.http import Patience, TransferError
from cigpose.download.integrity import Expected, IntegrityError, check_file
from cigpose.download.manifest import MANIFEST, Entry, entry_of
from cigpose.download.sources import SourceFile
from cigpose.download.transfer import PartialFile, StoppedError, Transfer
from cigpose.files.addresses import host_of


class DownloadError(ValueError):
    """What was asked for could not be downloaded; a sentence for the user."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One file asked for."""

    source: SourceFile
    target: Path
    urls: tuple[str, ...]
    """Public addresses, best first."""
    expected: Expected

    @property
    def size(self) -> int | None:
        """Bytes, roughly where only that is known."""
        return self.expected.bytes or self.source.about_bytes


def mirrored(url: str, mirror: str | None) -> str:
    """The address to ask for a public one: <mirror>/<host>/<path> with a mirror."""
    parts = urlsplit(url)
    if mirror is None or parts.netloc == urlsplit(mirror).netloc:
        return url
    query = f"?{parts.query}" if parts.query else ""
    return f"{mirror.rstrip('/')}/{parts.netloc}{parts.path}{query}"


class Fetcher:
    """Fetches files, several at a time."""

    def __init__(self, folder: Path, options: DownloadConfig, patience: Patience, say: Callable[[str], None]) -> None:
        self.folder, self.options, self.patience, self.say = folder, options, patience, say
        self.stop = threading.Event()

    def run(self, jobs: Sequence[Job], on_entry: Callable[[Entry], None]) -> dict[str, Entry]:
        """Fetch all of them; one that fails does not keep the others from coming.

        Args:
            jobs: the files.
            on_entry: called with each as it is in place, so that its digest is recorded whatever becomes of the others.

        Raises:
            DownloadError: a line for each file that no host gives.
            OSError: the disk refuses; everything stops.
        """
        if not jobs:
            return {}
        with (
            Board("download", [(job.source.name, job.size) for job in jobs]) as board,
            ThreadPoolExecutor(max(1, self.options.parallel_files)) as pool,
        ):
            try:
                futures = {pool.submit(self._fetch, job, board): job.source.name for job in jobs}
                return self._collect(futures, board, on_entry)
            except BaseException:
                self.stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _collect(
        self, futures: Mapping[Future[tuple[Entry, str]], str], board: Board, on_entry: Callable[[Entry], None]
    ) -> dict[str, Entry]:
        entries: dict[str, Entry] = {}
        failures: list[str] = []
        for future in as_completed(futures):
            name = futures[future]
            try:
                entries[name], checked = future.result()
                on_entry(entries[name])
                board.write(f"{name}: {human_bytes(entries[name].bytes)}, {checked}", self.say)
            except StoppedError:
                continue  # what stopped it comes from another future
            except DownloadError as err:
                failures.append(str(err))
                if len(entries) + len(failures) < len(futures):
                    board.write(f"{name}: failed; the others go on.", self.say)
        if failures:
            raise DownloadError("\n".join(failures))
        return entries

    def _fetch(self, job: Job, board: Board) -> tuple[Entry, str]:
        """One file, from the first of its hosts that gives it, and how it was checked."""
        reasons: list[str] = []
        for url in job.urls:
            try:
                return self._fetch_from(url, job, board)
            except (TransferError, IntegrityError) as err:
                reason = str(err) if isinstance(err, TransferError) else f"{self._host(url)} gives a wrong file: {err}"
                reasons.append(reason)
                if len(reasons) < len(job.urls):
                    board.write(f"{job.source.name}: {reason}. Trying the next host.", self.say)
            except OSError:
                self.stop.set()
                raise
        raise DownloadError(f"{job.source.name}: {'; '.join(reasons)}. {self._advice(job, reasons)}")

    def _fetch_from(self, url: str, job: Job, board: Board) -> tuple[Entry, str]:
        name, partial = job.source.name, PartialFile(self.folder / job.source.name)
        while True:
            transfer = Transfer(
                url=self._mirrored(url),
                partial=partial,
                patience=self._share_of_patience(job),
                expected_bytes=job.expected.bytes,
                checked_after=job.expected.sha256 is not None or job.expected.md5 is not None,
                rewrite=self._mirrored,
                on_progress=board.setter(name),
                on_wait=lambda reason, wait_s: board.write(
                    f"{name}: {reason}; next attempt in {max(wait_s, 0.1):.1f} s, from {human_bytes(partial.size)} on",
                    self.say,
                ),
                stop=self.stop,
            )
            transfer.run()
            try:
                found = check_file(partial.path, job.expected)
            except IntegrityError as err:
                partial.discard()
                if not transfer.resumed:
                    raise
                board.write(f"{name}: {err}. It was continued; fetching it anew in one piece.", self.say)
                continue
            partial.place(job.target)
            return entry_of(job.source, found), found.checked

    def _share_of_patience(self, job: Job) -> Patience:
        """Fewer attempts at each host where there are several."""
        attempts = max(2, self.patience.max_attempts // len(job.urls))
        return replace(self.patience, max_attempts=min(attempts, self.patience.max_attempts))

    def _mirrored(self, url: str) -> str:
        return mirrored(url, self.options.mirror)

    def _host(self, url: str) -> str:
        return host_of(self._mirrored(url))

    def _advice(self, job: Job, reasons: Sequence[str]) -> str:
        """What to do when no host gives a file."""
        by_hand = f"put it at {job.target}"
        differs = any("wrong file" in reason or "announces" in reason for reason in reasons)
        if differs and "recorded" in job.expected.authority:
            record = job.target.with_name(MANIFEST)
            return f"If its authors changed the file, delete {record} to record it anew; or {by_hand}."
        if self.options.mirror is not None:
            return f"Mend the mirror (its manifest.json or SHA256SUMS decides what is right), or {by_hand}."
        if is_drive(job.urls[-1]) or any("Drive" in reason for reason in reasons):
            return f"Open {job.urls[0]} in a browser where you are signed in to Google, download it and {by_hand}."
        return f"Run again later to go on from here, or get the file elsewhere and {by_hand}."
