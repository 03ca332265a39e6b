"""The Prefect flow `retrain`: one task for each DVC stage, in DVC's order.

    python -m pipelines.retrain                                 once, now
    python -m pipelines.retrain --serve --cron "0 3 * * 1"      every Monday at three, as long as this process lives
    prefect deploy --all                                        the deployments of prefect.yaml, for a worker anywhere

Stages run in a workspace of their own (`pipelines/retraining/workspace.py`); the user's tree stays as it is, and the
outcome is a DVC experiment. Prefect keeps its state in `.prefect` beside params.yaml unless PREFECT_HOME says else.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

import yaml

from pipelines.access import prefect_home, using_server
from pipelines.lineage import project_root
from pipelines.processes import environment, run_logged

ROOT = project_root()
prefect_home(ROOT)
os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "120")  # its first start takes 10 to 20 s

from prefect import Task, flow, get_run_logger, runtime, task  # noqa: E402  (reads the settings above)
from prefect.client.schemas.objects import (  # noqa: E402
    ConcurrencyLimitConfig,
    ConcurrencyLimitStrategy,
    State,
    TaskRun,
)
from prefect.states import Cancelled, Completed, Failed  # noqa: E402

from cigpose.config import public_params  # noqa: E402
from cigpose.config.schema import ConfigError  # noqa: E402
from cigpose.files.addresses import without_credentials  # noqa: E402
from cigpose.files.atomic import ClaimedError  # noqa: E402
from pipelines.retraining.artifacts import publish  # noqa: E402
from pipelines.retraining.overrides import Changes, asked_config  # noqa: E402
from pipelines.retraining.turn import Note, clear_killed, noted, only_retraining  # noqa: E402
from pipelines.retraining.words import LastWords  # noqa: E402
from pipelines.retraining.workspace import (  # noqa: E402
    Workspace,
    WorkspaceError,
    make_workspace,
    names_of,
    save_experiment,
    stale_stages,
)

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
    "robustness": Policy(timeout_s=24 * HOUR),
    "evaluate": Policy(timeout_s=12 * HOUR),
    "register": Policy(timeout_s=HOUR, retries=1, retry_delay_s=30, retry_after_s=30),  # finds again what it registered
}
OTHER = Policy(timeout_s=24 * HOUR)


def run_stage(stage: str, workspace: Workspace, note: Note, experiment: str, force: bool) -> State[Any]:
    """Bring one DVC stage up to date (all members of a `foreach`), its output in the flow's log line by line.

    Cancelling the flow stops the stage and all it started before this returns.

    Returns: state of the task run, named by what was done.

    Raises:
        StageError: the stage failed.
    """
    log, words, started = get_run_logger(), LastWords(stage), time.monotonic()

    def on_line(line: str) -> None:
        log.info(line)
        words.hear(line)

    environment = workspace.env(experiment)
    if force and runtime.task_run.run_count <= 1:  # another try goes on from the first one's checkpoint
        environment["CIGPOSE_RESTART"] = "1"
    command = [sys.executable, "-m", "dvc", "repro", "--single-item", *(["--force"] if force else []), stage]
    status = run_logged(command, cwd=workspace.folder, on_line=on_line, env=environment, on_start=note.write)
    if status:
        error = StageError(words.sentence or f"{stage}: dvc exited with {status}.")
        error.seconds = time.monotonic() - started
        raise error
    return Completed(name=words.done)


def stage_task(stage: str) -> Task[..., Any]:
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


def flow_run_name() -> str:
    """Name of the flow run at work: the experiment that it makes, and what is asked of it."""
    parameters = runtime.flow_run.parameters
    wishes = [f"{key}={public_params(value, key)}" for key, value in (parameters.get("overrides") or {}).items()]
    if preset := parameters.get("preset"):
        wishes.insert(0, f"preset {preset}")
    if force := parameters.get("force"):
        wishes.append("all stages anew" if force is True else f"{', '.join(force)} anew")
    if first := parameters.get("start_from"):
        wishes.append(f"from {first} on")
    name = f"retrain-{datetime.now(UTC):%Y%m%d-%H%M%S}"
    return without_credentials(f"{name}: {', '.join(wishes) or 'what has changed'}")


@flow(name="retrain", flow_run_name=flow_run_name, log_prints=True, validate_parameters=True)
def retrain(
    overrides: dict[str, Any] | None = None,
    force: bool | list[str] = False,
    start_from: str | None = None,
    preset: str | None = None,
) -> State[str]:
    """Bring every DVC stage up to date in a workspace of its own; what comes out is a DVC experiment.

    Args:
        overrides: values in place of those of params.yaml, such as {"train.epochs": 10}, for this run alone.
        force: stages to run even if nothing they depend on has changed, or all; a training begins anew.
        start_from: first stage to look at; those before it are taken as they are.
        preset: experiment to take in place of params.yaml.

    Returns: state of the flow run, its message one line about the registered model.
    """
    try:
        config, changes = asked_config(ROOT / "params.yaml", preset, overrides or {})
        with only_retraining(ROOT):
            if marked := clear_killed(ROOT):
                get_run_logger().info("Flow run %s was killed; it is marked now.", marked)
            with noted(ROOT, str(runtime.flow_run.id)) as note:
                workspace = make_workspace(ROOT, config if changes or preset else None)
                tell(workspace, preset, changes)
                return run_stages(workspace, note, changes, forced=force, first=start_from)
    except ClaimedError as err:
        return Cancelled(name="Busy", message=str(err))
    except (StageError, WorkspaceError, ConfigError, OSError, TimeoutError) as err:
        return Failed(message=without_credentials(str(err)))


def tell(workspace: Workspace, preset: str | None, changes: Changes) -> None:
    """Log what this run works on."""
    log = get_run_logger()
    log.info("The workspace is a copy of %s.", workspace.baseline[:10])
    if workspace.edited:
        log.info("Taken along, not yet committed: %s.", _some(workspace.edited))
    if workspace.left_out:
        log.info("Left out, as git does not know them: %s.", _some(workspace.left_out))
    if preset:
        log.info("Preset %s in place of params.yaml.", preset)
    for key, (old, new) in changes.items():
        log.info("params.yaml: %s was %r, is %r in this run.", key, old, new)


def _some(names: Sequence[str]) -> str:
    more = [f"and {len(names) - 20} more"] if len(names) > 20 else []
    return ", ".join([*names[:20], *more])


def run_stages(
    workspace: Workspace, note: Note, changes: Changes, *, forced: bool | list[str], first: str | None
) -> State[str]:
    """Run what is stale or forced, keep the outcome as an experiment, and show it."""
    order = stages(workspace.folder)
    chosen = stages_from(order, first)
    anew = set(order if forced is True else forced or ())
    if unknown := anew - set(order):
        raise StageError(f"force: there is no stage {min(unknown)!r} in dvc.yaml. Stages: {', '.join(order)}.")
    if not (names_of(stale_stages(workspace.folder)) | anew) & set(chosen):
        return Completed(name="Up to date", message="Nothing that the stages depend on has changed; none was run.")
    experiment = str(runtime.flow_run.name).partition(":")[0]
    for stage in chosen:
        # Called, not submitted: a cancellation then reaches the stage (a thread of its own would not hear of it).
        stage_task(stage)(stage, workspace, note, experiment, force=stage in anew)  # type: ignore[unused-coroutine]
    save_experiment(workspace, experiment)
    line = publish(workspace, experiment, changes)
    return Completed(message=f"{line} `dvc exp apply {experiment}` takes it.")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("-S", "--set", action="append", default=[], metavar="KEY=VALUE", help="a value in place of that in params.yaml")
    add("--preset", help="experiment to take in place of params.yaml")
    add("--force", nargs="*", metavar="STAGE", help="run these stages, or all, even if nothing has changed")
    add("--from", dest="start_from", metavar="STAGE", help="first stage to look at")
    add("--serve", action="store_true", help="stay and run by schedule or when asked to in the UI")
    add("--cron", help="the schedule, for --serve")
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
        "force": True if options.force == [] else options.force or False,
        "start_from": options.start_from,
        "preset": options.preset,
    }
    try:
        asked_config(ROOT / "params.yaml", options.preset, parameters["overrides"])  # before a server is started
        if not options.serve:
            with only_retraining(ROOT):
                pass
        with using_server(ROOT):
            if options.serve:
                serve_flow(parameters, options.cron)
                return 0
            state: State[Any] = retrain(**parameters, return_state=True)
    except (ConfigError, OSError, TimeoutError) as err:
        print(without_credentials(f"retrain: {err}"), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    if not state.is_completed():
        print(f"retrain: {state.message}", file=sys.stderr)
        return 1
    print(state.message)
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
