"""The `cigpose` command: presets, params.yaml, shards, prediction, export, evaluation."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from cigpose import config as configuration
from cigpose.config.params_file import write_params
from cigpose.files.addresses import without_credentials

# Subcommands that live with the code they run; each module has `add_parser(subparsers)`.
COMMANDS: tuple[str, ...] = ("cigpose.cli.shards", "cigpose.cli.evaluate", "cigpose.cli.deploy")


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
    presets = subparsers.add_parser(
        "presets", help="list the experiments, or print one", description="List the experiments, or print one."
    )
    presets.add_argument("name", nargs="?", help="print this preset as it is written")
    presets.set_defaults(run=_presets)
    use = subparsers.add_parser(
        "use", help="write params.yaml from a preset", description="Write the complete params.yaml of a preset."
    )
    use.add_argument("name", help="see `cigpose presets`")
    use.add_argument("--params", type=Path, default=Path("params.yaml"), help="file to write (default: %(default)s)")
    use.set_defaults(run=_use)
    for module in COMMANDS:
        importlib.import_module(module).add_parser(subparsers)
    return parser


def _presets(options: argparse.Namespace) -> None:
    if options.name:
        print(configuration.preset_text(options.name), end="")
        return
    from cigpose.model.complexity import complexity  # torch: only where it is needed

    print(f"{'preset':<36} {'h x w':>9} {'K':>4} {'params':>8} {'GFLOPs':>7} {'AP':>5}  published by")
    for name in configuration.presets():
        config = configuration.load_preset(name)
        width, height = config.model.input_size
        size = complexity(config)
        published = config.published
        print(
            f"{name:<36} {height:>4} x{width:>3} {len(config.keypoint_set):>4} {size.parameters / 1e6:>7.1f}M "
            f"{size.multiply_adds_edgewise / 1e9:>7.1f} {published.ap if published else '-':>5}  "
            f"{published.source if published else ''}".rstrip()
        )
    print("\nGFLOPs are multiply-adds of one forward pass, in billions, counted as published.")
    print("`cigpose use NAME` writes params.yaml.")


def _use(options: argparse.Namespace) -> None:
    config = configuration.load_preset(options.name)
    write_params(config, options.params)
    print(f"{options.params}: {config.name}. `dvc repro` runs it; `dvc params diff` shows what changed.")


if __name__ == "__main__":
    sys.exit(main())
