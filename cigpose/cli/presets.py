"""`cigpose presets` and `cigpose use`."""

from __future__ import annotations

import argparse
from pathlib import Path

from cigpose import config as configuration
from cigpose.config.params_file import write_params


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add both subcommands."""
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
    use.add_argument(
        "--fast",
        action="store_true",
        help="for GPUs: bf16, compiled, cuDNN's fastest kernels; no longer the paper's",
    )
    use.set_defaults(run=_use)


def _presets(options: argparse.Namespace) -> None:
    if options.name:
        print(configuration.preset_text(options.name), end="")
        return
    from cigpose.model.complexity import complexity

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
    if options.fast:
        config = configuration.fast_variant(config)
    write_params(config, options.params)
    print(f"{options.params}: {config.name}. `dvc repro` runs it; `dvc params diff` shows what changed.")
