"""Progress bars: live on a terminal, one line now and then in a log."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm


def progress(
    iterable: Iterable[Any] | None = None, *, total: int | float | None, desc: str, unit: str, **options: Any
) -> tqdm:
    """A tqdm bar on stderr.

    Args:
        iterable: what to go through, or None to call `update` by hand.
        total: how many there are; None if unknown.
        desc: what is being done.
        unit: what is counted.
        **options: further arguments of tqdm (`unit_scale`, `initial`, ...).
    """
    live = sys.stderr.isatty()
    return tqdm(
        iterable,
        total=total,
        desc=desc,
        unit=unit,
        mininterval=0.2 if live else 10.0,
        dynamic_ncols=live,
        ncols=None if live else 100,
        ascii=None if live else " =",
        disable=bool(os.environ.get("CIGPOSE_NO_PROGRESS")),
        **options,
    )
