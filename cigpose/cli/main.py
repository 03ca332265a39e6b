"""The `cigpose` command: presets, params.yaml, shards, prediction, export, evaluation, detectors."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from cigpose.cli import deploy, detectors, evaluate, export, presets, shards
from cigpose.files.addresses import without_credentials


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand; a user's mistake is one sentence and exit status 2, a part that failed 1."""
    options = _parser().parse_args(arguments)
    try:
        return options.run(options) or 0
    except (ValueError, OSError) as err:
        print(without_credentials(f"cigpose: {err}"), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="cigpose", description=__doc__)
    subparsers = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for group in (presets, shards, evaluate, deploy, detectors, export):
        group.add_parser(subparsers)
    return parser


if __name__ == "__main__":
    sys.exit(main())
