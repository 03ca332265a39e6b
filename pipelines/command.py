"""The `cigpose` command as it is installed: the library's subcommands, and those of the pipeline around it."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from cigpose.cli.main import main as run
from pipelines import models


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand."""
    return run(arguments, (models,))


if __name__ == "__main__":
    sys.exit(main())
