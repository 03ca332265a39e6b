"""The Prefect flow `retrain`: one task for each DVC stage, in DVC's order.

    python -m pipelines.retrain                                 once, now
    python -m pipelines.retrain --serve --cron "0 3 * * 1"      every Monday at three, as long as this process lives
    prefect deploy --all                                        the deployments of prefect.yaml, for a worker anywhere

Prefect keeps its state in `.prefect` beside params.yaml unless PREFECT_HOME says else.
"""

from __future__ import annotations

import argparse
import difflib
import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

import yaml

from pipelines.access import prefect_home, server_to_use
from pipelines.lineage import project_root
from pipelines.processes import environment, run_logged

ROOT = project_root()
prefect_home(ROOT)
os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "120")  # its first start takes 10 to 20 s

from prefect import Task, flow, get_run_logger, settings, task  # noqa: E402  (reads the settings above when imported)
from prefect.artifacts import create_link_artifact, create_markdown_artifact, create_table_artifact  # noqa: E402
from prefect.client.schemas.objects import (  # noqa: E402
    ConcurrencyLimitConfig,
    ConcurrencyLimitStrategy,
    State,
    TaskRun,
)

from cigpose.config import Config, config_from_mapping, load_params, public_params  # noqa: E402
from cigpose.config.params_file import write_params  # noqa: E402
from cigpose.config.schema import ConfigError  # noqa: E402
from cigpose.files.addresses import without_credentials  # noqa: E402

HOUR = 3600


class StageError(RuntimeError):
    """A stage that failed, in its own last words."""

    seconds: float = math.inf
    """How long it had been running."""


@dataclass(frozen=True, kw_only=True)
class Policy:
    """How long a stage may take, and how often it is tried again."""

    timeout_s: int
    retries: int = 0
    retry_delay_s: int = 0
    retry_after_s: float = 0.0
    """No second try for a stage that failed sooner: what stops it at once, such as a wrong parameter, stays wrong."""

    def allows_retry(self, error: BaseException) -> bool:
        """Whether another try may help after this error."""
        return isinstance(error, StageError) and error.seconds >= self.retry_after_s


POLICIES = {
    "render": Policy(timeout_s=6 * HOUR),
    "download": Policy(timeout_s=48 * HOUR, retries=2, retry_delay_s=60),  # goes on where it stopped
    "pretrained": Policy(timeout_s=6 * HOUR, retries=2, retry_delay_s=60),
    "shard": Policy(timeout_s=12 * HOUR),
    "locate": Policy(timeout_s=HOUR, retries=2, retry_delay_s=30),
    "train": Policy(
        timeout_s=14 * 24 * HOUR, retries=1, retry_delay_s=10, retry_after_s=120
    ),  # goes on from its checkpoint
    "evaluate": Policy(timeout_s=12 * HOUR),
    "register": Policy(timeout_s=HOUR, retries=1, retry_delay_s=30, retry_after_s=30),  # finds again what it registered
}
OTHER = Policy(timeout_s=24 * HOUR)
_DVC_NOISE = re.compile(
    r"^(ERROR: failed to reproduce|Running stage|Stage '|> |WARNING: |To track|\s*git add|Updating lock)"
)


def run_stage(stage: str, force: bool = False) -> None:
    """Bring one DVC stage up to date (all members of a `foreach`), its output in the flow's log line by line.

    Cancelling the flow stops the stage and all it started before this returns.

    Raises:
        StageError: the stage failed.
    """
    log = get_run_logger()
    last, started = "", time.monotonic()

    def on_line(line: str) -> None:
        nonlocal last
        log.info(line)
        if not _DVC_NOISE.match(line):
            last = line.strip()

    command = [sys.executable, "-m", "dvc", "repro", "--single-item", *(["--force"] if force else []), stage]
    status = run_logged(command, cwd=ROOT, on_line=on_line)
    if status:
        error = StageError(f"{stage}: {(last or f'dvc exited with {status}.').removeprefix(f'{stage}: ')}")
        error.seconds = time.monotonic() - started
        raise error


def stage_task(stage: str) -> Task[..., None]:
    """The task of a stage, with its retries and time limit."""
    policy = POLICIES.get(stage, OTHER)

    def may_retry(task: Task[..., Any], task_run: TaskRun, state: State[Any]) -> bool:
        try:
            state.result()
        except Exception as err:
            return policy.allows_retry(err)
        return False

    return task(
        name=stage,
        task_run_name=stage,
        retries=policy.retries,
        retry_delay_seconds=policy.retry_delay_s,
        retry_condition_fn=may_retry,
        timeout_seconds=policy.timeout_s,
        persist_result=False,
    )(run_stage)


def stages(root: Path) -> list[str]:
    """Names of the stages of dvc.yaml so that each follows what it needs; a `foreach` is one.

    Raises:
        StageError: dvc.yaml or params.yaml cannot be read; in DVC's words.
    """
    command = [sys.executable, "-m", "dvc", "dag", "--dot"]
    run = subprocess.run(command, cwd=root, env=environment(), capture_output=True, text=True)
    if run.returncode:
        raise StageError(f"dvc.yaml: {(run.stderr.strip().splitlines() or ['dvc dag failed'])[-1]}")
    needs: dict[str, set[str]] = {}
    for line in run.stdout.splitlines():
        names = [name.partition("@")[0] for name in re.findall(r'"([^"]+)"', line)]
        for name in names:
            needs.setdefault(name, set())
        if len(names) == 2 and names[0] != names[1]:
            needs[names[1]].add(names[0])
    written = list(yaml.safe_load((root / "dvc.yaml").read_text(encoding="utf-8"))["stages"])
    sorter, order = TopologicalSorter(needs), []
    sorter.prepare()
    while sorter.is_active():
        ready = sorted(sorter.get_ready(), key=lambda name: written.index(name) if name in written else len(written))
        order += ready
        sorter.done(*ready)
    return order


def stages_from(order: Sequence[str], first: str | None) -> list[str]:
    """The stages from `first` on; all of them for None.

    Raises:
        StageError: there is no such stage.
    """
    if first is None:
        return list(order)
    if first not in order:
        raise StageError(f"start_from: there is no stage {first!r} in dvc.yaml. Stages: {', '.join(order)}.")
    return list(order[order.index(first) :])


def apply_overrides(path: Path, overrides: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Write new values into params.yaml, as `dvc exp run -S` does: they stay there after the run.

    Args:
        path: params.yaml.
        overrides: `train.epochs` -> value, of keys that params.yaml has; a table (`data.locations`) is given whole.

    Returns: key -> (value before, value now), of those that changed, as they may be shown.

    Raises:
        ConfigError: a key that does not exist, or a value that does not fit; params.yaml is untouched.
    """
    before = load_params(path).to_mapping()
    values = json.loads(json.dumps(before))
    for key, value in overrides.items():
        *sections, name = key.split(".")
        section = values
        for part in sections:
            if not isinstance(section.get(part), dict):
                raise ConfigError(f"overrides: {key}: {part!r} is not a section of params.yaml.")
            section = section[part]
        if name not in section:
            near = difflib.get_close_matches(name, section, n=1, cutoff=0.5)
            hint = f"Did you mean {near[0]!r}?" if near else "Add it to params.yaml by hand, or give the whole table."
            raise ConfigError(f"overrides: {key}: unknown key. {hint}")
        section[name] = value
    config: Config = config_from_mapping(values)
    after = config.to_mapping()
    changes = {key: (_look_up(before, key), _look_up(after, key)) for key in overrides}
    changes = {key: (old, new) for key, (old, new) in changes.items() if old != new}
    if changes:
        write_params(config, path)
    return {key: (public_params(old, key), public_params(new, key)) for key, (old, new) in changes.items()}


def _look_up(values: Any, key: str) -> Any:
    for part in key.split("."):
        values = values.get(part) if isinstance(values, Mapping) else None
    return values


@flow(name="retrain", log_prints=True, validate_parameters=True)
def retrain(overrides: dict[str, Any] | None = None, force: bool = False, start_from: str | None = None) -> str:
    """Bring every DVC stage up to date and show what came out.

    Args:
        overrides: values to write into params.yaml first, such as {"train.epochs": 10}. They stay there.
        force: run stages even if nothing they depend on has changed.
        start_from: first stage to look at; those before it are taken as they are.

    Returns: one line about the registered model.
    """
    log = get_run_logger()
    changes = apply_overrides(ROOT / "params.yaml", overrides) if overrides else {}
    for key, (old, new) in changes.items():
        log.info("params.yaml: %s was %r, is %r now.", key, old, new)
    for stage in stages_from(stages(ROOT), start_from):
        # Called, not submitted: a cancellation then reaches the stage (a thread of its own would not hear of it).
        stage_task(stage)(stage, force=force)
    return publish(ROOT, changes)


def publish(root: Path, changes: Mapping[str, tuple[Any, Any]]) -> str:
    """Artifacts of the flow run: the table of metrics, the registered version, the link to MLflow.

    Returns: one line about the registered model.
    """
    metrics, registered = _read(root / "data/metrics/evaluate.json"), _read(root / "data/registered.json")
    table = metric_rows(metrics)
    if table:
        create_table_artifact(key="retrain-metrics", table=table, description="Evaluation of this run's model.")
    line = registered.get("decision_text") or "No model was registered."
    text = [f"### {registered.get('model', 'No model')} {registered.get('version', '')}".rstrip(), "", line, ""]
    if changes:
        text += ["| params.yaml | before | now |", "| --- | --- | --- |"]
        text += [f"| {key} | {old} | {new} |" for key, (old, new) in changes.items()]
    create_markdown_artifact(key="retrain-registered", markdown="\n".join(text), description="Registered model.")
    if registered.get("url"):
        create_link_artifact(key="retrain-mlflow", link=registered["url"], link_text="The run in MLflow")
    return line


def metric_rows(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Nested metrics (part -> figure -> value) as a table of one row a part; flat ones as rows of name and value."""
    rows = []
    for part, figures in metrics.items():
        if isinstance(figures, Mapping):
            numbers = {name: round(value, 4) for name, value in figures.items() if isinstance(value, (int, float))}
            rows.append({"part": part, **numbers})
        elif isinstance(figures, (int, float)):
            rows.append({"name": part, "value": round(figures, 4)})
    return rows


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "-S", "--set", action="append", default=[], metavar="KEY=VALUE", help="write a value into params.yaml first"
    )
    parser.add_argument("--force", action="store_true", help="run stages even if nothing has changed")
    parser.add_argument("--from", dest="start_from", metavar="STAGE", help="first stage to look at")
    parser.add_argument("--serve", action="store_true", help="stay and run by schedule or when asked to in the UI")
    parser.add_argument("--cron", help="the schedule, for --serve")
    options = parser.parse_args(arguments)
    if options.cron and not options.serve:
        parser.error("--cron needs --serve; for schedules that outlive this process use prefect.yaml.")
    if any("=" not in item for item in options.set):
        parser.error("-S takes KEY=VALUE, such as -S train.epochs=10.")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the flow once, or serve it; 1 when a stage fails."""
    options = _parse(arguments)
    parameters = {
        "overrides": {key: yaml.safe_load(value) for key, _, value in (item.partition("=") for item in options.set)},
        "force": options.force,
        "start_from": options.start_from,
    }
    try:
        chosen = {getattr(settings, name): value for name, value in server_to_use(ROOT).items()}
        with settings.temporary_settings(chosen):
            if options.serve:
                serve_flow(parameters, options.cron)
            else:
                print(retrain(**parameters))
    except (StageError, ConfigError, OSError, TimeoutError) as err:
        print(without_credentials(f"retrain: {err}"), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def serve_flow(parameters: dict[str, Any], cron: str | None) -> None:
    """Stay, and run the flow by schedule or when asked to, one run at a time."""
    retrain.serve(
        name="served",
        cron=cron,
        parameters=parameters,
        pause_on_shutdown=False,  # else stopping this process pauses the schedule for good
        global_limit=ConcurrencyLimitConfig(limit=1, collision_strategy=ConcurrencyLimitStrategy.CANCEL_NEW),
    )


if __name__ == "__main__":
    sys.exit(main())
