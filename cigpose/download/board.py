"""One progress bar over several files that are read or fetched at a time."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence

from cigpose.progress import progress


def human_bytes(count: int) -> str:
    """A size in decimal units, three digits: 19.3 GB, 816 MB, 18 kB, 512 B."""
    value, units = float(count), ["TB", "GB", "MB", "kB", "B"]
    while value >= 999.5 and len(units) > 1:
        value /= 1000
        units.pop()
    return f"{value:.3g} {units[-1]}" if value < 100 else f"{value:.0f} {units[-1]}"


class Board:
    """A bar in bytes; files report to it from any thread.

    Args:
        desc: what is being done.
        files: name and size of each; None where unknown until it is told.
    """

    def __init__(self, desc: str, files: Sequence[tuple[str, int | None]]) -> None:
        self._have = dict.fromkeys((name for name, _ in files), 0)
        self._total = dict(files)
        self._lock = threading.Lock()
        self._bar = progress(total=self._sum(), desc=desc, unit="B", unit_scale=True)
        self._live = sys.stderr.isatty() and not self._bar.disable

    def __enter__(self) -> Board:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def setter(self, name: str) -> Callable[[int, int | None], None]:
        """A listener to (bytes so far, total or None) of one file."""

        def set_bytes(have: int, total: int | None) -> None:
            with self._lock:
                step = have - self._have[name]
                self._have[name] = have
                if total is not None and total != self._total[name]:
                    self._total[name] = total
                    self._bar.total = self._sum()
                self._bar.set_postfix_str(self._active(), refresh=False)
                self._bar.update(step)

        return set_bytes

    def adder(self, name: str) -> Callable[[int], None]:
        """A listener to the bytes of each further piece of one file."""
        listen = self.setter(name)
        return lambda count: listen(self._have[name] + count, None)

    def write(self, line: str, say: Callable[[str], None]) -> None:
        """A line above the bar."""
        with self._lock:
            if self._live:
                self._bar.clear()
            say(line)
            if self._live:
                self._bar.refresh()

    def _sum(self) -> int | None:
        return None if any(total is None for total in self._total.values()) else sum(filter(None, self._total.values()))

    def _active(self) -> str:
        """The files under way, each with its share."""
        parts = []
        for name, have in self._have.items():
            total = self._total[name]
            if have > 0 and (total is None or have < total):
                parts.append(f"{name} {have / total:.0%}" if total else f"{name} {human_bytes(have)}")
        return ", ".join(parts[:3])
