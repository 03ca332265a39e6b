"""The Prefect flow `retrain`: one task for each DVC stage, in DVC's order.

    python -m pipelines.retrain             once, now
    python -m pipelines.retrain --serve     the deployments of prefect.yaml, as long as this process lives (`make ui`)
    prefect deploy --all                    the same, for a worker anywhere

Stages run in a workspace of their own (`pipelines/retraining/workspace.py`); the user's tree stays as it is, and the
outcome is a DVC experiment. Prefect keeps its state in `.prefect` beside params.yaml unless PREFECT_HOME says else.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import yaml

from pipelines.access import prefect_home, using_server
from pipelines.lineage import project_root
from pipelines.processes import run_logged

ROOT = project_root()
prefect_home(ROOT)
os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "120")  # its first start takes 10 to 20 s

from prefect import Task, flow, get_run_logger, runtime, task  # noqa: E402  (reads the settings above)
from prefect.client.schemas.objects import State, TaskRun  # noqa: E402
from prefect.states import Cancelled, Completed, Failed  # noqa: E402

from cigpose.config import Config, public_params  # noqa: E402
from cigpose.config.schema import ConfigError  # noqa: E402
from cigpose.files.addresses import without_credentials  # noqa: E402
from cigpose.files.atomic import ClaimedError, claimed  # noqa: E402
from pipelines.retraining.artifacts import Retrained, outcome_of, publish  # noqa: E402
from pipelines.retraining.choices import ALL, BEGINNING, OWN, Anew, First, Preset, written_stages  # noqa: E402
from pipelines.retraining.deployments import serve_deployments  # noqa: E402
from pipelines.retraining.notice import Ending, tell_people  # noqa: E402
from pipelines.retraining.order import stages, stages_from  # noqa: E402
from pipelines.retraining.overrides import Changes, asked_config  # noqa: E402
from pipelines.retraining.policies import OTHER, POLICIES, StageError  # noqa: E402
from pipelines.retraining.series import Axes, Series, parse_axes  # noqa: E402
from pipelines.retraining.series_page import write_series_page  # noqa: E402
from pipelines.retraining.sources import News, drop_outdated, keep_seen, look_at_sources  # noqa: E402
from pipelines.retraining.turn import LOCK, Note, clear_killed, noted, only_retraining  # noqa: E402
from pipelines.retraining.words import LastWords  # noqa: E402
from pipelines.retraining.workspace import (  # noqa: E402
    Workspace,
    WorkspaceError,
    make_workspace,
    names_of,
    save_experiment,
    stale_stages,
)


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


def flow_run_name() -> str:
    """Name of the flow run at work: the experiment that it makes, and what is asked of it."""
    parameters = runtime.flow_run.parameters
    wishes = [f"{key}={public_params(value, key)}" for key, value in (parameters.get("overrides") or {}).items()]
    if (preset := parameters.get("preset", OWN)) != OWN:
        wishes.insert(0, f"preset {preset}")
    if force := parameters.get("force"):
        wishes.append("all stages anew" if ALL in force else f"{', '.join(force)} anew")
    if (first := parameters.get("start_from", BEGINNING)) != BEGINNING:
        wishes.append(f"from {first} on")
    if parameters.get("only_if_new_data"):
        wishes.append("if there are new data")
    name = f"retrain-{datetime.now(UTC):%Y%m%d-%H%M%S}"
    return without_credentials(f"{name}: {', '.join(wishes) or 'what has changed'}")


@flow(name="retrain", flow_run_name=flow_run_name, log_prints=True, validate_parameters=True)
def retrain(
    preset: Preset = OWN,
    force: tuple[Anew, ...] = (),
    start_from: First = BEGINNING,
    overrides: dict[str, Any] | None = None,
    only_if_new_data: bool = False,
) -> State[Retrained | None]:
    """Bring every DVC stage up to date in a workspace of its own; what comes out is a DVC experiment.

    Args:
        preset: experiment to take in place of params.yaml.
        force: stages to run even if nothing they depend on has changed; a training begins anew.
        start_from: first stage to look at; those before it are taken as they are.
        overrides: values in place of those of params.yaml, such as {"train.epochs": 10}, for this run alone.
        only_if_new_data: look at the sources first, and run nothing unless shards would change.

    Returns: state of the flow run, its message one line about the registered model.
    """
    try:
        config, changes = asked_config(ROOT / "params.yaml", None if preset == OWN else preset, overrides or {})
    except (ConfigError, OSError) as err:
        return Failed(message=without_credentials(str(err)))
    try:
        with only_retraining(ROOT):
            if marked := clear_killed(ROOT):
                get_run_logger().info("Flow run %s was killed; it is marked now.", marked)
            with noted(ROOT, str(runtime.flow_run.id)) as note:
                workspace = make_workspace(ROOT, config if changes or preset != OWN else None)
                tell(workspace, preset, changes)
                wanted = Wanted(anew=force, first=start_from, only_if_new_data=only_if_new_data)
                return run_if_stale(workspace, note, config, changes, wanted)
    except ClaimedError as err:
        return Cancelled(name="Busy", message=str(err))
    except (StageError, WorkspaceError, ConfigError, OSError, TimeoutError) as err:
        message = without_credentials(str(err))
        notify(config, "failed", message)
        return Failed(message=message)


def tell(workspace: Workspace, preset: str, changes: Changes) -> None:
    """Log what this run works on."""
    log = get_run_logger()
    log.info("The workspace is a copy of %s.", workspace.baseline[:10])
    if workspace.edited:
        log.info("Taken along, not yet committed: %s.", _some(workspace.edited))
    if workspace.left_out:
        log.info("Left out, as git does not know them: %s.", _some(workspace.left_out))
    if preset != OWN:
        log.info("Preset %s in place of params.yaml.", preset)
    for key, (old, new) in changes.items():
        log.info("params.yaml: %s was %r, is %r in this run.", key, old, new)


def _some(names: Sequence[str]) -> str:
    more = [f"and {len(names) - 20} more"] if len(names) > 20 else []
    return ", ".join([*names[:20], *more])


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What a run is to look at."""

    anew: Sequence[str]
    first: str
    only_if_new_data: bool


def run_if_stale(
    workspace: Workspace, note: Note, config: Config, changes: Changes, wanted: Wanted
) -> State[Retrained | None]:
    """Run what is stale or forced, keep the outcome as an experiment and show it; or say why there is nothing to do."""
    news = look_at_sources(workspace) if wanted.only_if_new_data else News()
    if wanted.only_if_new_data:
        get_run_logger().info(news.sentence())
        if not news.reasons:
            keep_seen(ROOT, news)
            return Completed(name="No new data", message=news.sentence())
        drop_outdated(workspace, news)
    order = stages(workspace.folder)
    chosen = stages_from(order, None if wanted.first == BEGINNING else wanted.first)
    forced = set(order if ALL in wanted.anew else wanted.anew)
    if unknown := forced - set(order):
        raise StageError(f"force: there is no stage {min(unknown)!r} in dvc.yaml. Stages: {', '.join(order)}.")
    if not (names_of(stale_stages(workspace.folder)) | forced) & set(chosen):
        message = "Nothing that the stages depend on has changed; none was run."
        return Completed(name="Up to date", message=message, data=outcome_of(workspace, None))
    experiment = str(runtime.flow_run.name).partition(":")[0]
    for stage in chosen:
        # Called, not submitted: a cancellation then reaches the stage (a thread of its own would not hear of it).
        stage_task(stage)(stage, workspace, note, experiment, force=stage in forced)  # type: ignore[unused-coroutine]
    save_experiment(workspace, experiment)
    keep_seen(ROOT, news)
    outcome = outcome_of(workspace, experiment)
    publish(workspace, outcome, changes)
    notify(config, outcome.ending, outcome.line, outcome.link)
    because = f"{news.sentence()} " if news.reasons else ""
    return Completed(message=f"{because}{outcome.line} `dvc exp apply {experiment}` takes it.", data=outcome)


def notify(config: Config, ending: Ending, sentence: str, link: str | None = None) -> None:
    """Tell who wants to know how this run ended."""
    if refused := tell_people(config.notify, ending, str(runtime.flow_run.name), sentence, link):
        get_run_logger().warning(refused)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.retrain", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, known = parser.add_argument, written_stages(ROOT)
    add("-S", "--set", action="append", default=[], metavar="KEY=VALUE", help="a value in place of that in params.yaml")
    add("--preset", default=OWN, help="experiment to take in place of params.yaml")
    add("--force", nargs="*", choices=[ALL, *known], metavar="STAGE", help="run these stages, or all, in any case")
    add("--from", dest="start_from", choices=known, default=BEGINNING, metavar="STAGE", help="first stage to look at")
    add("--only-if-new-data", action="store_true", help="run nothing unless shards would change")
    about = "a run for each value, and for each point of the grid where given more than once; goes on where it stopped"
    add("--for-each", action="append", default=[], metavar="KEY=VALUE,VALUE", help=about)
    add("--serve", action="store_true", help="stay, and run the deployments of prefect.yaml when they are due")
    options = parser.parse_args(arguments)
    if options.for_each and (options.serve or options.only_if_new_data):
        parser.error("--for-each goes with neither --serve nor --only-if-new-data.")
    if any("=" not in item for item in options.set):
        parser.error("-S takes KEY=VALUE, such as -S train.epochs=10.")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the flow once, or serve its deployments; 1 when a stage fails."""
    options = _parse(arguments)
    overrides = {key: yaml.safe_load(value) for key, _, value in (item.partition("=") for item in options.set)}
    preset = None if options.preset == OWN else options.preset
    asked: dict[str, Any] = {
        "preset": options.preset,
        "force": (ALL,) if options.force == [] else tuple(options.force or ()),
        "start_from": options.start_from,
    }
    try:
        if options.for_each:
            return run_series(parse_axes(options.for_each), preset, overrides, asked)
        asked_config(ROOT / "params.yaml", preset, overrides)  # before a server is started
        if options.serve:
            with using_server(ROOT):
                serve_deployments(ROOT)
            return 0
        with only_retraining(ROOT):
            pass
        with using_server(ROOT):
            state = run_once(asked | {"overrides": overrides, "only_if_new_data": options.only_if_new_data})
    except (ValueError, OSError, TimeoutError) as err:
        print(without_credentials(f"retrain: {err}"), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    if not state.is_completed():
        print(f"retrain: {state.message}", file=sys.stderr)
        return 1
    print(state.message)
    return 0


def run_once(parameters: Mapping[str, Any]) -> State[Retrained | None]:
    """The flow in this process."""
    return retrain(**parameters, return_state=True)  # type: ignore[return-value]  # the state that it gives


def run_series(axes: Axes, preset: str | None, overrides: dict[str, Any], asked: Mapping[str, Any]) -> int:
    """Run what is left of a series; 1 where a run of it fails."""
    series = Series(ROOT, axes, preset, overrides, asked)

    def retrain_point(values: dict[str, Any]) -> tuple[bool, str, Retrained | None]:
        while True:
            with claimed(ROOT / LOCK, "A retraining of this project", wait=True):
                pass
            state = run_once({**asked, "overrides": values})
            if state.name != "Busy":  # another one was faster: its turn first
                return state.is_completed(), str(state.message), state.result() if state.is_completed() else None

    def changed(series: Series) -> None:
        write_series_page(series)
        states = [point.state for point in series.points]
        print(f"{states.count('done')} of {len(states)} runs are done: {series.page}", flush=True)

    with series.alone(), using_server(ROOT):
        return 0 if series.run(retrain_point, changed) else 1


def be_stoppable() -> None:
    """Let Ctrl-C and SIGTERM end this process by an exception, so that a series notes it and Prefect's server ends too.

    A shell's `&` starts its children with SIGINT off, and Python leaves SIGTERM to the kernel.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))


if __name__ == "__main__":
    be_stoppable()
    sys.exit(main())
