"""`cigpose models`: the models that were registered, and which of them is the champion.

A VERSION is a number, an alias (champion, challenger), or as MLflow writes it: models:/NAME@ALIAS, models:/NAME/NUMBER.
MLflow is the one of params.yaml (registry.tracking_uri), else MLFLOW_TRACKING_URI, else mlflow.db beside it.
Exit status: 0 done, 1 not done, with one sentence why, 2 a command line that is none.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cigpose.config import Config, load_params
from cigpose.files.addresses import without_credentials

if TYPE_CHECKING:  # MLflow takes seconds: only where it is needed
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

    from pipelines.registry.versions import Registry


def add_parser(subparsers: Any) -> None:
    """Add the group."""
    models = subparsers.add_parser(
        "models",
        help="registered models: list, show, compare, evaluate, promote, roll back, pull",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = models.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def add(name: str, run: Callable[[_Room, argparse.Namespace], Any], help_text: str) -> argparse.ArgumentParser:
        parser = commands.add_parser(name, help=help_text, description=help_text[0].upper() + help_text[1:] + ".")
        parser.add_argument("--params", type=Path, default=Path("params.yaml"), help="default: %(default)s")
        parser.add_argument("--name", help="registered model (default: registry.model of params.yaml)")
        parser.add_argument("--json", action="store_true", help="print JSON")
        parser.set_defaults(run=lambda options: _run(run, options))
        return parser

    add("list", _list, "list the versions, the newest first")
    add("show", _show, "show a version: figures, decision, origin").add_argument("version", metavar="VERSION")
    compare = add("compare", _compare, "compare two versions part by part, with intervals of the differences")
    compare.add_argument("first", metavar="A")
    compare.add_argument("second", metavar="B")
    evaluate = add("evaluate", _evaluate, "measure a version as params.yaml says now, and keep the figures with it")
    evaluate.add_argument("version", metavar="VERSION")
    evaluate.add_argument("--shards", type=Path, default=Path("data/shards"), help="default: %(default)s")
    evaluate.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: the GPU if there is one)")
    promote = add("promote", _promote, "make a version champion, if the gate has nothing against it")
    promote.add_argument("version", metavar="VERSION")
    promote.add_argument("--anyway", action="store_true", help="whatever the gate says")
    rollback = add("rollback", _rollback, "make the champion before this one champion again")
    rollback.add_argument("--to", metavar="VERSION", help="another version than that")
    pull = add("pull", _pull, "copy a version into a new folder, which `cigpose predict --model` takes")
    pull.add_argument("version", metavar="VERSION")
    pull.add_argument("folder", type=Path, metavar="DIR", help="new or empty")


class _Room:
    """What every command needs: the experiment, and the registry once it is known which."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.config: Config = load_params(options.params)
        self.asked: str | None = options.name
        self.metric = self.config.evaluate.metric

    def open(self, model: str | None = None) -> tuple[MlflowClient, Registry]:
        from pipelines.registry.catalogue import open_registry

        return open_registry(self.config, model or self.asked)

    def version(self, name: str) -> tuple[MlflowClient, Registry, ModelVersion]:
        from pipelines.registry.catalogue import split_name

        model, version = split_name(name)
        client, registry = self.open(model)
        return client, registry, registry.get(version)

    def facts(self, client: MlflowClient, version: ModelVersion) -> dict[str, Any]:
        from pipelines.registry.catalogue import version_facts

        return version_facts(client, self.config, version, self.metric)


def _run(command: Callable[[_Room, argparse.Namespace], Any], options: argparse.Namespace) -> int:
    """Do it; what a user can do something about is one sentence."""
    from mlflow.exceptions import MlflowException

    from pipelines.registry.versions import RegistryError
    from pipelines.tracking.address import be_impatient

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    be_impatient()
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")  # of two hundred small files
    try:
        answer = command(_Room(options), options)
    except (RegistryError, MlflowException, ValueError, OSError) as err:
        first = (str(err).strip().splitlines() or [type(err).__name__])[0]
        print(without_credentials(f"cigpose models: {first}"), file=sys.stderr)
        return 1
    values, text = answer
    print(json.dumps(values, indent=1) if options.json else text)
    return 0


def _list(room: _Room, options: argparse.Namespace) -> tuple[Any, str]:
    from pipelines.registry.outcome import text_table

    client, registry = room.open()
    found = [room.facts(client, registry.get(str(version.version))) for version in registry.all()]
    head = ["version", "alias", room.metric, "95 % interval", "decision", "registered", "run"]
    rows = [
        [
            str(facts["version"]),
            ", ".join(facts["aliases"]) or "-",
            _number(facts["value"]),
            "{:.3f} to {:.3f}".format(*facts["interval"]) if facts["interval"] else "-",
            "rolled back" if facts["rolled_back"] else str(facts["decision"] or "-").replace("_", " "),
            facts["registered"][:16].replace("T", " "),
            facts["run"] or "-",
        ]
        for facts in found
    ]
    return found, "\n".join([registry.model, *text_table([head, *rows])])


def _number(value: float | None) -> str:
    return f"{value:.4f}" if value is not None else "-"


def _show(room: _Room, options: argparse.Namespace) -> tuple[Any, str]:
    from pipelines.registry.card import measured_rows
    from pipelines.registry.gate import Decision
    from pipelines.registry.measurement import Measurement
    from pipelines.registry.outcome import text_table

    client, _, version = room.version(options.version)
    facts, decision = room.facts(client, version), Decision.from_tags(version.tags)
    aliases = ", ".join(facts["aliases"]) or "no alias"
    lines = [f"{facts['model']}, version {facts['version']}, {aliases}", "", facts["run"] or "", f"  {facts['url']}"]
    lines += [f"  git {facts['git_revision']}, registered {facts['registered']}", ""]
    lines += [*text_table(measured_rows(Measurement.from_tags(version.tags))), ""]
    lines += [f"Decision  {decision.text if decision else 'none yet'}"]
    lines += [f"          {change.sentence()}" for change in (decision.changes if decision else ())]
    if facts["rolled_back"]:
        lines += [f"Rolled back: {facts['rolled_back']}"]
    return facts, "\n".join(lines)


def _compare(room: _Room, options: argparse.Namespace) -> tuple[Any, str]:
    from pipelines.registry.catalogue import compared
    from pipelines.registry.gate import Rules
    from pipelines.registry.outcome import text_table

    _, _, first = room.version(options.first)
    _, registry, second = room.version(options.second)
    changes = compared(registry, first, second, Rules.of(room.config))
    names = [f"{version.name} {version.version}" for version in (first, second)]
    head = ["part", "of", *names, "difference", "95 % interval", "known"]
    rows = [
        [
            change.part,
            change.of,
            f"{change.theirs:.3f}",
            f"{change.ours:.3f}",
            f"{change.ours - change.theirs:+.3f}",
            "{:+.3f} to {:+.3f}".format(*change.interval) if change.interval else "-",
            change.how,
        ]
        for change in changes
    ]
    values = {"first": names[0], "second": names[1], "changes": [change.to_json() for change in changes]}
    return values, "\n".join(text_table([head, *rows]))


def _evaluate(room: _Room, options: argparse.Namespace) -> tuple[Any, str]:
    from pipelines.registry.card import measured_rows
    from pipelines.registry.gate import Rules
    from pipelines.registry.outcome import text_table
    from pipelines.registry.remeasure import ask_again, measure_again

    client, registry, version = room.version(options.version)
    measured = measure_again(client, registry, version, room.config, options.shards, options.device)
    decision = ask_again(client, registry, version, Rules.of(room.config))
    lines = text_table(measured_rows(measured))
    if decision:
        lines += ["", f"Decision  {registry.model}: {decision.text}"]
    facts = room.facts(client, registry.get(str(version.version)))
    return {**facts, "settled": decision.text if decision else None}, "\n".join(lines)


def _promote(room: _Room, options: argparse.Namespace) -> tuple[Any, str]:
    from pipelines.registry.gate import Rules
    from pipelines.registry.promotion import promote

    client, registry, version = room.version(options.version)
    text = promote(registry, version, Rules.of(room.config), anyway=options.anyway)
    return room.facts(client, registry.get(str(version.version))), text


def _rollback(room: _Room, options: argparse.Namespace) -> tuple[Any, str]:
    from pipelines.registry.promotion import roll_back

    client, registry = room.open()
    version, text = roll_back(registry, registry.get(options.to) if options.to else None)
    return room.facts(client, registry.get(str(version))), text


def _pull(room: _Room, options: argparse.Namespace) -> tuple[Any, str]:
    from pipelines.registry.catalogue import pull

    client, _, version = room.version(options.version)
    pull(client, version, options.folder)
    said = f"{options.folder}: {version.name}, version {version.version}. `cigpose predict --model {options.folder}`"
    return {"folder": str(options.folder), "model": version.name, "version": int(version.version)}, said
