from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import cv2
import numpy as np
import pytest

from cigpose.config import PublishedConfig
from cigpose.evaluate.checkpoint import Evaluation, dataset_truth, open_shards, pictures_of
from cigpose.evaluate.coco import evaluate_predictions
from cigpose.evaluate.interventions import intervened_keypoints
from cigpose.evaluate.page import write_page
from cigpose.evaluate.paired import PairedDifference
from cigpose.evaluate.predictions import Predictions
from cigpose.evaluate.robustness import Retained, Robustness
from cigpose.evaluate.tables import MatchTables
from cigpose.keypoints import COCO, KeypointSet
from cigpose.model.causal import CausalIntervention
from cigpose.model.weights import load_checkpoint

from .conftest import PERSONS_PER_IMAGE, Project

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
EVIL = '<script>alert("x")</script>'
SEVERAL_PARTS = dataclasses.replace(
    COCO,
    parts={
        "body": tuple(range(5, 17)),
        "foot": (15, 16),
        "face": tuple(range(5)),
        "left_hand": (5, 7, 9),
        "right_hand": (6, 8, 10),
    },
)
"""COCO with the parts of COCO-WholeBody by name: tables as wide as there are."""
LONG = "a-name-without-any-break-in-it-" * 6
PHONE, DESKTOP = 390, 1280

MEASURE = """<!doctype html><style>body { margin: 0 } iframe { border: 0; display: block; height: 2400px }</style>
<iframe src="report.html" style="width: PHONEpx"></iframe><iframe src="report.html" style="width: DESKTOPpx"></iframe>
<pre></pre><script>
onload = () => {
  const found = [...document.querySelectorAll("iframe")].map(frame => {
    const page = frame.contentDocument, root = page.documentElement;
    page.querySelectorAll("details").forEach(one => one.open = true);
    const name = one => one.tagName + " " + one.textContent.trim().slice(0, 40);
    const all = [...page.body.querySelectorAll("*")].filter(one => one.getClientRects().length);
    return {
      width: root.clientWidth,
      overflow: root.scrollWidth - root.clientWidth,
      outside: all.filter(one => one.getBoundingClientRect().right > root.clientWidth + 0.5).map(name),
      cut: all.filter(one => one.clientWidth && one.scrollWidth > one.clientWidth + 1).map(name),
      images: page.images.length,
      broken: [...page.images].filter(one => !one.complete || !one.naturalWidth).map(one => one.alt),
    };
  });
  document.querySelector("pre").textContent = JSON.stringify(found);
};
</script>""".replace("PHONE", str(PHONE)).replace("DESKTOP", str(DESKTOP))


def evaluated(project: Project, keypoint_set: KeypointSet | None = None) -> Evaluation:
    """Labels with some noise, as if a model had predicted them."""
    config = dataclasses.replace(
        project.config, published=PublishedConfig(ap=76.6, source="a table & <another>"), seed=project.config.seed
    )
    if keypoint_set is not None:
        table = {"name": keypoint_set.name, "names": list(keypoint_set.names), "sigmas": list(keypoint_set.sigmas)}
        parts = {part: [keypoint_set.names[k] for k in index] for part, index in keypoint_set.parts.items()}
        pairs = [[keypoint_set.names[a], keypoint_set.names[b]] for a, b in keypoint_set.flip_pairs]
        config = dataclasses.replace(config, keypoints={**table, "parts": parts, "flip_pairs": pairs})
    truth = dataset_truth(open_shards(project.config, "people", project.shards), project.config)
    rng = np.random.default_rng(0)
    corners = np.c_[truth.bbox_xywh[:, :2], truth.bbox_xywh[:, :2] + truth.bbox_xywh[:, 2:]]
    noise = rng.normal(0, 1.5, truth.keypoints[..., :2].shape) * rng.uniform(0, 3, (len(truth), 1, 1))
    predictions = Predictions(
        image_id=truth.image_id,
        person_id=truth.annotation_id,
        keypoints=truth.keypoints[..., :2] + noise,
        keypoint_scores=rng.uniform(0.3, 1, truth.keypoints.shape[:2]),
        center=corners[:, :2],
        scale=corners[:, 2:],
        bbox_xyxy=corners,
        box_score=np.ones(len(truth)),
    )
    metrics = evaluate_predictions(predictions, truth, config.keypoint_set, config.evaluate)
    return Evaluation(metrics=metrics, predictions=predictions, truth=truth, config=config, seconds=2.0)


def written(folder: Path, project: Project, evaluation: Evaluation, **facts: str) -> Path:
    (folder / "loss.csv").write_text("step,epoch,loss,loss_kpt\n20,0,9.5,8.5\n40,1,5.5,5.0\n60,2,3.5,3.25\n")
    (folder / "validation.csv").write_text("epoch,step,AP,body/AP,body/AR\n1,20,0.1,0.1,0.2\n2,40,0.4,0.4,0.5\n")
    return write_page(
        folder / "report.html",
        evaluation,
        open_shards(evaluation.config, "people", project.shards),
        facts={"boxes": "ground truth", **facts},
        loss=folder / "loss.csv",
        validation=folder / "validation.csv",
        model=load_checkpoint(project.checkpoint),
        robustness=measured(evaluation),
        champion={
            "name": "the champion, version 7",
            "metrics": {part: {"AP": 0.4321} for part in evaluation.config.keypoint_set.parts},
            "intervals": {"body": [0.4, 0.46]},
        },
    )


def measured(evaluation: Evaluation) -> Robustness:
    """A robustness that nobody measured, of every part."""
    parts = [*evaluation.config.keypoint_set.parts, "whole"]
    names = ["occlusion", "clutter", "low_light", "blur", "noise", "jpeg", "crop_shift"]
    return Robustness(
        people=10,
        pictures=6,
        severities=(1, 2, 3),
        retained=[
            Retained(corruption=name, part=part, clean=0.8, ap=0.4, share=0.5, low=0.456, high=0.544)
            for part in parts
            for name in ("all", *names)
        ],
        by_severity={name: {part: [0.7, 0.4, 0.1] for part in parts} for name in names},
        reversed_context=[
            PairedDifference(part=part, first=0.8, second=0.7, low=-0.2, high=0.01, scenes=6) for part in parts
        ],
    )


@pytest.fixture(scope="module")
def page(project: Project, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report, written once for all tests that only look at it."""
    return written(tmp_path_factory.mktemp("page"), project, evaluated(project, SEVERAL_PARTS), data=LONG)


class Reader(HTMLParser):
    """Tags with their attributes, and all text, of a page."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_model_has_the_intervals_of_its_page_in_the_registry_too(page: Path, project: Project) -> None:
    text = Reader(page).text
    for low, high in MatchTables.of(evaluated(project, SEVERAL_PARTS)).intervals().values():
        assert f"{low:.3f} \u2013 {high:.3f}" in text


def test_a_report_is_one_page_that_needs_nothing_beside_it(page: Path) -> None:
    seen = Reader(page)
    sources = [attributes["src"] or "" for tag, attributes in seen.tags if "src" in attributes]
    assert all(source.startswith(("data:image/svg+xml;base64,", "data:image/jpeg;base64,")) for source in sources)
    assert not {tag for tag, _ in seen.tags} & {"script", "link", "iframe", "object", "base"}
    assert all((attributes.get("href") or "#").startswith("#") for _, attributes in seen.tags)
    assert page.stat().st_size < 5_000_000
    for text in (
        "tiny on people",
        "published 0.766",
        "95 % interval",
        "right hand",
        "Best",
        "Median",
        "Worst",
        "left eye / right eye",
        "PCK@0.1",
        "the champion, version 7",
        "0.432",
        "crop shift",
        "46 \u2013 54",
        "-0.100",
        "Rings are on keypoints",
        "speed",
    ):
        assert text in seen.text
    kinds = Counter(source.partition(";")[0] for source in sources)
    assert kinds["data:image/svg+xml"] == 9 and kinds["data:image/jpeg"] == 6 + 10  # 6 images have people


@pytest.mark.slow
def test_equal_evaluations_give_equal_pages(page: Path, project: Project, tmp_path: Path) -> None:
    assert written(tmp_path, project, evaluated(project, SEVERAL_PARTS), data=LONG).read_bytes() == page.read_bytes()


def test_names_of_users_are_shown_and_not_obeyed(page: Path, project: Project, tmp_path: Path) -> None:
    names = [f"{EVIL}{k}" if k % 2 else rf'"><img src=x onerror="alert({k})"> $\frac{{{k}' for k in range(17)]
    hostile = KeypointSet.from_mapping(
        {
            "name": "mine",
            "names": names,
            "sigmas": [0.05] * 17,
            "parts": {"body": names[:9], "<b>$x^$ &amp;": names[9:]},
            "flip_pairs": [names[1:3], names[3:5]],
        }
    )
    evaluation = evaluated(project, hostile)
    seen = Reader(written(tmp_path, project, evaluation, **{EVIL: "<img src=y>"}))
    assert {tag for tag, _ in seen.tags} == {tag for tag, _ in Reader(page).tags}
    assert not any("onerror" in attributes for _, attributes in seen.tags)
    assert all((attributes.get("src") or "data:").startswith("data:") for _, attributes in seen.tags)
    for text in (f"{EVIL}1", names[2], "<b>$x^$ &amp;", "<img src=y>", "a table & <another>"):
        assert text in seen.text


@pytest.mark.slow
def test_a_model_that_found_nobody_and_labels_of_nobody_have_a_report(project: Project, tmp_path: Path) -> None:
    evaluation = evaluated(project)
    lost = dataclasses.replace(evaluation.predictions, keypoints=evaluation.predictions.keypoints + 5000)
    text = Reader(written(tmp_path, project, dataclasses.replace(evaluation, predictions=lost))).text
    assert "not found" in text and "Kinds of error" not in text
    nobody = dataclasses.replace(evaluation.truth, keypoints=evaluation.truth.keypoints * [1, 1, 0])
    nothing = dataclasses.replace(
        evaluation, predictions=Predictions.empty(17), truth=nobody, metrics={"body/AP": -1.0}
    )
    text = Reader(written(tmp_path, project, nothing)).text
    assert "Worst" not in text and "Figures per part" in text


def test_a_table_of_the_training_that_is_none_is_named(project: Project, tmp_path: Path) -> None:
    (tmp_path / "loss.csv").write_text("step,loss\n1,2\nwhat,3\n")
    with pytest.raises(ValueError, match=r"loss\.csv: not a table of numbers .*'what'"):
        write_page(
            tmp_path / "report.html",
            evaluated(project),
            open_shards(project.config, "people", project.shards),
            facts={},
            loss=tmp_path / "loss.csv",
        )
    assert not (tmp_path / "report.html").exists()


def test_what_the_causal_intervention_replaced_is_what_its_scores_choose(project: Project) -> None:
    model = load_checkpoint(project.checkpoint)
    image = next(image for _, image in pictures_of(open_shards(project.config, "people", project.shards), {2}))
    box = {"center": np.array([60.0, 50.0]), "scale": np.array([60.0, 90.0]), "input_size": (64, 96)}
    found = intervened_keypoints(model, image, **box)
    assert found is not None and found.shape == (17,) and found.sum() == project.config.model.causal.eval_top_k
    chosen: list[int] = []
    for module in model.modules():
        if isinstance(module, CausalIntervention):
            module.__dict__["select"] = lambda score: (chosen.append(int(score.argmax())), score == score.max())[1]
    assert intervened_keypoints(model, image, **box).tolist() == found.tolist() == [k == chosen[0] for k in range(17)]
    for module in model.modules():
        if isinstance(module, CausalIntervention):
            module.eval_top_k = 0
    assert intervened_keypoints(model, image, **box) is None


def test_pictures_are_found_by_their_ids(project: Project) -> None:
    shards = open_shards(project.config, "people", project.shards)
    found = {image_id: image.shape for image_id, image in pictures_of(shards, {2, 7, 999})}
    assert found == {2: (120, 160, 3), 7: (120, 160, 3)}
    assert len(PERSONS_PER_IMAGE) == 7


def chromium(folder: Path, *options: str) -> str:
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"]
    command += ["--disable-background-networking", "--disable-component-update", "--allow-file-access-from-files"]
    command += ["--hide-scrollbars", f"--user-data-dir={folder / 'chromium'}", "--virtual-time-budget=5000", *options]
    done = subprocess.run(
        [*command, (folder / "measure.html").as_uri()], check=True, capture_output=True, text=True, timeout=120
    )
    return done.stdout


@pytest.mark.slow  # starts a browser three times
def test_at_phone_and_desktop_width_nothing_is_cut_every_picture_loads_and_dark_is_dark(
    page: Path, tmp_path: Path
) -> None:
    if CHROMIUM is None:
        pytest.skip("chromium is not installed, so that nobody looked at the page")
    shutil.copy(page, tmp_path / "report.html")
    (tmp_path / "measure.html").write_text(MEASURE)
    dump = chromium(tmp_path, "--dump-dom")
    phone, desktop = json.loads(dump.partition("<pre>")[2].partition("</pre>")[0])
    assert (phone["width"], desktop["width"]) == (PHONE, DESKTOP)
    for seen in (phone, desktop):
        assert seen["images"] == 25 and seen["broken"] == []
        assert seen["overflow"] == 0 and seen["outside"] == [] and seen["cut"] == []
    brightness = {}
    for scheme, options in {"light": [], "dark": ["--force-dark-mode"]}.items():
        picture = tmp_path / f"{scheme}.png"
        chromium(tmp_path, f"--window-size={DESKTOP},4800", f"--screenshot={picture}", *options)
        brightness[scheme] = np.median(cv2.imread(str(picture)))
    assert brightness["light"] > 200 > 60 > brightness["dark"]
