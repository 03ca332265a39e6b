"""The `cigpose` command: presets, params.yaml, shards, prediction, export, evaluation, detectors, own data."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from types import ModuleType

from cigpose.cli import dataset, deploy, detectors, evaluate, export, presets, shards
from cigpose.files.addresses import without_credentials


def main(arguments: Sequence[str] | None = None, more: Sequence[ModuleType] = ()) -> int:
    """Run one subcommand; a user's mistake is one sentence and exit status 2, a part that failed 1.

    Args:
        arguments: of the command line; None for this process's own.
        more: groups of subcommands that the library knows nothing of, modules with `add_parser`.
    """
    options = _parser(more).parse_args(arguments)
    try:
        status = options.run(options) or 0
        sys.stdout.flush()  # so that a reader who has gone is met here
        return status
    except BrokenPipeError:  # `cigpose presets | head`: who reads has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left goes nowhere, without a word
        return 128 + signal.SIGPIPE
    except (ValueError, OSError) as err:
        print(without_credentials(f"cigpose: {err}"), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _parser(more: Sequence[ModuleType]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="cigpose", description=__doc__)
    subparsers = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for group in (presets, dataset, shards, evaluate, deploy, detectors, export, *more):
        group.add_parser(subparsers)
    return parser


if __name__ == "__main__":
    sys.exit(main())
