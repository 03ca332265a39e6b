"""What a stage's output says of it: whether it ran, and why it failed."""

from __future__ import annotations

import re

_DVC_NOISE = re.compile(
    r"^(ERROR: failed to reproduce|Running stage|Stage '|> |WARNING: |To track|\s*git add|Updating lock|Use `dvc push)"
)


class LastWords:
    """Listens to the output of `dvc repro` for one stage."""

    def __init__(self, stage: str) -> None:
        self._stage, self._last, self._own = stage, "", ""
        self._ran = self._cached = False

    def hear(self, line: str) -> None:
        """Take the next line."""
        self._ran |= line.startswith("Running stage ")
        self._cached |= line.startswith("Stage ") and "is cached" in line
        if line.startswith(f"{self._stage}: "):
            self._own = line.strip()
        if not _DVC_NOISE.match(line):
            self._last = line.strip()

    @property
    def sentence(self) -> str:
        """Why it failed: the stage's own sentence, else the last line that is not DVC's frame; begins with its name.

        What Python or a library says after that sentence, while the process ends, is not the reason.
        """
        found = self._own or self._last
        return found if found.startswith(f"{self._stage}: ") or not found else f"{self._stage}: {found}"

    @property
    def done(self) -> str:
        """Name of the state of a stage that is up to date now."""
        return "Completed" if self._ran else "From the cache" if self._cached else "Up to date"
