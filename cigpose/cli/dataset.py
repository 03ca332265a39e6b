"""The group `cigpose dataset`: from a folder of one's own pictures and labels to a params.yaml."""

from __future__ import annotations

import argparse
from types import ModuleType

from cigpose.cli import dataset_check, dataset_init, dataset_sigmas

COMMANDS: tuple[ModuleType, ...] = (dataset_init, dataset_check, dataset_sigmas)
"""Modules of the subcommands, each with `add_parser`."""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the group and its subcommands."""
    dataset = subparsers.add_parser("dataset", help="your own pictures and labels")
    commands = dataset.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_parser(commands)
