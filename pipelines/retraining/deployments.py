"""The deployments of prefect.yaml, served by one process: `make ui` has it, and no work pool or worker is needed."""

from __future__ import annotations

import asyncio
import signal
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    DeploymentFilter,
    DeploymentFilterName,
    FlowRunFilter,
    FlowRunFilterExpectedStartTime,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import StateType
from prefect.deployments.runner import RunnerDeployment
from prefect.runner import Runner
from prefect.schedules import Cron, Schedule

from pipelines.access import SERVING

FILE = "prefect.yaml"


class DeploymentError(ValueError):
    """prefect.yaml cannot be used."""


def read_deployments(root: Path) -> list[RunnerDeployment]:
    """The deployments of prefect.yaml, as a serving process runs them.

    Raises:
        DeploymentError: the file is missing, or says what cannot be served.
    """
    path = root / FILE
    try:
        written = yaml.safe_load(path.read_text(encoding="utf-8"))["deployments"]
        return [_deployment(about) for about in written]
    except FileNotFoundError as err:
        raise DeploymentError(f"{path}: not found. It comes with the project: `git checkout {FILE}`.") from err
    except (KeyError, TypeError, ValueError, yaml.YAMLError) as err:
        reason = " ".join(str(err).split())
        raise DeploymentError(
            f"{path}: not a list of deployments that can be served ({type(err).__name__}: {reason}). Each needs name, "
            "entrypoint and schedules of cron and timezone."
        ) from err


def _deployment(about: dict[str, Any]) -> RunnerDeployment:
    return RunnerDeployment.from_entrypoint(
        entrypoint=about["entrypoint"],
        name=about["name"],
        description=about.get("description"),
        parameters=about.get("parameters") or {},
        schedules=[_schedule(each) for each in about.get("schedules") or ()],
    )


def _schedule(about: dict[str, Any]) -> Schedule:
    return Cron(about["cron"], timezone=about.get("timezone"), active=about.get("active", True))


def serve_deployments(root: Path) -> None:
    """Run the deployments of prefect.yaml when they are due or asked for, until a signal; then stop what runs.

    Raises:
        DeploymentError: prefect.yaml cannot be used.
    """
    deployments = read_deployments(root)
    forget_missed([deployment.name for deployment in deployments])
    runner = Runner(name="retrain", pause_on_shutdown=False)  # it would pause the schedules for good
    for deployment in deployments:
        runner.add_deployment(deployment)
    print(f"{SERVING} {', '.join(deployment.name for deployment in deployments)}.", flush=True)
    asyncio.run(_run_until_signal(runner))


async def _run_until_signal(runner: Runner) -> None:
    """Run it; on a signal stop the runs at work, each to the last process of its stage, and end.

    Prefect's own handler ends the loop before a run is stopped: the run stays RUNNING, and its stage lives on.
    """
    loop, stopping = asyncio.get_running_loop(), asyncio.Event()

    def stop(*_: object) -> None:
        loop.call_soon_threadsafe(stopping.set)

    runner.handle_sigterm = stop  # type: ignore[method-assign]
    signal.signal(signal.SIGINT, stop)
    running = loop.create_task(runner.start())
    waiting = loop.create_task(stopping.wait())
    await asyncio.wait((running, waiting), return_when=asyncio.FIRST_COMPLETED)
    if not running.done():
        await runner.astop()
    waiting.cancel()
    await running


def forget_missed(names: list[str]) -> int:
    """Delete scheduled runs whose time passed while no process served them: all would be started at once.

    Returns: how many.
    """
    with get_client(sync_client=True) as client:
        missed = client.read_flow_runs(
            deployment_filter=DeploymentFilter(name=DeploymentFilterName(any_=names)),
            flow_run_filter=FlowRunFilter(
                state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.SCHEDULED])),
                expected_start_time=FlowRunFilterExpectedStartTime(before_=datetime.now(UTC)),  # type: ignore[arg-type]
            ),
        )
        for run in missed:
            if run.auto_scheduled:
                client.delete_flow_run(run.id)
    return len(missed)
