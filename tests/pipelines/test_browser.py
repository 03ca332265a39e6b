"""Prefect's page as a person uses it: Chromium, driven by playwright, before a real `make ui`."""

from __future__ import annotations

import os
import re
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import pytest
from toy_stages import ORDER, make_toy, stage_group, wait_for

from cigpose.config import Config
from pipelines import processes, ui

if TYPE_CHECKING:
    from playwright.sync_api import Page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
KEPT = os.environ.get("CIGPOSE_KEEP_SCREENSHOTS")
"""A folder for the pictures of the README."""


@pytest.fixture
def toy(project: Path, config: Config) -> Path:
    return make_toy(project, config)


@pytest.fixture
def pages(toy: Path) -> Iterator[str]:
    """`make ui` of the toy project; the address of Prefect's page."""
    ports = {"PREFECT_SERVER_API_PORT": str(ui.free_port()), "MLFLOW_PORT": str(ui.free_port())}
    with (toy / "ui.log").open("w") as log:
        process = processes.start([sys.executable, "-m", "pipelines.ui"], cwd=toy, env=ports, output=log)
        try:
            wait_for(lambda: "Ctrl-C" in (toy / "ui.log").read_text() or process.poll() is not None)
            yield f"http://127.0.0.1:{ports['PREFECT_SERVER_API_PORT']}"
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(60)
            processes.stop_group(process)


@pytest.fixture
def page(pages: str, toy: Path) -> Iterator[Page]:
    """A tab of Chromium in which somebody has logged in."""
    if CHROMIUM is None:
        pytest.skip("there is no Chromium here (Debian: apt-get install chromium)")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (extra `dev`)")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        tab = browser.new_page(viewport={"width": 1400, "height": 900}, color_scheme="light")
        tab.set_default_timeout(60_000)
        tab.goto(f"{pages}/deployments")
        tab.locator("input").fill((toy / ".prefect/token").read_text().strip())
        tab.keyboard.press("Enter")
        tab.get_by_text("on-new-data").wait_for()
        tab.goto(f"{pages}/deployments")  # without what the page said before the password
        yield tab
        browser.close()


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("CIGPOSE_BROWSER"), reason="three minutes of clicking: set CIGPOSE_BROWSER=1")
def test_a_person_sees_the_schedule_starts_a_run_with_a_preset_sees_its_artifacts_and_cancels_another(
    page: Page, pages: str, toy: Path
) -> None:
    page.get_by_text("At 03:00 AM every day").wait_for()
    ask_for_a_run(page, "Custom run")
    page.locator("button", has_text="params.yaml").focus()
    page.keyboard.press("ArrowDown")
    page.get_by_text("cigpose-l_coco_256x192", exact=True).wait_for()  # a list of presets, which typing narrows
    keep(page, "prefect-run")
    page.keyboard.type("quickstart")
    page.get_by_text("quickstart", exact=True).last.click()
    with page.expect_response(re.compile(r"/create_flow_run$")):  # leaving before it is answered takes it back
        page.get_by_role("button", name="Submit").click()
    open_newest_run(page, pages, "preset quickstart")
    page.get_by_text("Completed", exact=True).first.wait_for(timeout=180_000)
    assert all(stage in page.inner_text("body") for stage in ORDER)
    page.get_by_text("Artifacts", exact=True).click()
    page.get_by_text("retrain-metrics", exact=True).wait_for()
    keep(page, "prefect-artifacts")
    run = page.url
    page.get_by_text("retrain-registered", exact=True).click()
    page.get_by_text("toy: version 3 is the new champion.").first.wait_for()
    page.goto(run)
    page.get_by_text("Artifacts", exact=True).click()
    page.get_by_text("retrain-pictures", exact=True).click()
    picture = page.locator("img[src^='data:image/jpeg']").first
    picture.wait_for()
    assert picture.evaluate("image => image.decode().then(() => image.naturalWidth)") == 960

    (toy / "control/slow").write_text("train")
    page.goto(f"{pages}/deployments")
    with page.expect_response(re.compile(r"/create_flow_run$")):
        ask_for_a_run(page, "Quick run")
    group = stage_group(toy)
    open_newest_run(page, pages, "what has changed")
    page.get_by_role("button", name="Cancel", exact=True).first.click()
    page.get_by_role("dialog").get_by_role("button", name="Confirm").click()
    page.get_by_text("Cancelled", exact=True).first.wait_for(timeout=60_000)
    wait_for(lambda: processes.group_members(group) == [], timeout_s=30)


def ask_for_a_run(page: Page, how: str) -> None:
    page.get_by_text("manual", exact=True).click()
    page.get_by_role("button", name="Run", exact=True).click()
    page.get_by_text(how, exact=True).click()


def open_newest_run(page: Page, pages: str, wish: str) -> None:
    """The page of the run whose name ends so; it has its name once its process has begun."""
    page.goto(f"{pages}/runs")
    page.get_by_text(re.compile(rf"^retrain-\d+-\d+: {wish}$")).first.click(timeout=120_000)


def keep(page: Page, name: str) -> None:
    """See that the page is drawn; keep its picture where that is asked for."""
    path = Path(KEPT or ".") / f"{name}.png"
    page.screenshot(path=path)
    assert cv2.imread(str(path)).std() > 5, "a page that was not drawn is of one colour"
