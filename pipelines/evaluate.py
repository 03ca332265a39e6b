"""Stage `evaluate`: `python -m pipelines.evaluate` measures data/model on the dataset `data.val`.

data/report/results.json        COCO results, which other tools score identically
data/report/predictions.npz     every person, every keypoint, every score
data/report/measurement.json    figures with intervals, people and protocol: what a registration elsewhere needs
data/report/matches.npz         what another model is compared with picture by picture
data/report/report.html         one page: figures, curves, kinds of error, robustness, people, pictures, protocol
data/report/robustness.json     {retained: {part: [share, low, high]}, ...}, where the stage before measured it
data/report/pictures/*.jpg      predictions beside the labels, contact sheets
data/report/model.onnx          the network, checked against torch
data/report/calibration.json    what the scores of these two files mean, as probabilities
data/metrics/evaluate.json      {part: {figure: value}}
data/plots/parts.csv            AP and AR per part
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from cigpose.config import Config
from cigpose.deploy.export import export_onnx
from cigpose.deploy.onnx import onnx_figures
from cigpose.evaluate import report
from cigpose.evaluate.calibration import fit_calibration
from cigpose.evaluate.checkpoint import Evaluation, evaluate_checkpoint, sample_pictures
from cigpose.evaluate.labels import open_shards
from cigpose.evaluate.page import write_page
from cigpose.evaluate.robustness import Robustness
from cigpose.files.atomic import write_json
from cigpose.files.digest import sha256_of
from cigpose.model.weights import load_checkpoint
from pipelines.paths import (
    CHAMPION_FIGURES,
    LOSS_PLOT,
    METRICS,
    PARTS_PLOT,
    REPORT,
    ROBUSTNESS,
    SHARDS,
    VALIDATION_PLOT,
    WEIGHTS,
)
from pipelines.registry.measurement import write_measurement
from pipelines.stage import stage


@stage("evaluate", writes=(REPORT, METRICS, PARTS_PLOT))
def main(config: Config) -> None:
    """Evaluate the trained model."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    evaluation = evaluate_checkpoint(WEIGHTS, config, shards_root=SHARDS, results_path=REPORT / "results.json")
    assert evaluation is not None  # one process: this is rank 0
    write_results(evaluation, REPORT)
    exported = export_onnx(load_checkpoint(WEIGHTS), evaluation.config, REPORT / "model.onnx")
    metrics = evaluation.metrics | onnx_figures(exported, evaluation.config, SHARDS)
    write_measurement(evaluation, metrics, REPORT, SHARDS)
    calibrate(evaluation, REPORT)
    report.write_parts_csv(evaluation.metrics, PARTS_PLOT)
    report.write_metrics_json(metrics, METRICS)
    metric, own = evaluation.config.evaluate.metric, evaluation.config.keypoint_set
    value, speed = evaluation.metrics.get(metric, float("nan")), len(evaluation.predictions) / evaluation.seconds
    print(f"{config.data.val}: {metric} {value:.4f}, {speed:.3g} people a second; sigmas {own.sigmas_origin}")
    print(report.parts_table(metrics), end="")


def write_results(evaluation: Evaluation, folder: Path) -> None:
    """Predictions, contact sheets and the page; the curves of the training come with its data/model."""
    config = evaluation.config
    shards = open_shards(config, config.data.val, SHARDS)
    evaluation.predictions.save(folder / "predictions.npz")
    report.contact_sheets(
        sample_pictures(shards, config.registry.pictures),
        evaluation.predictions,
        config.keypoint_set,
        folder / "pictures",
        truth=evaluation.truth,
    )
    robustness = Robustness.from_mapping(_read(ROBUSTNESS), where=str(ROBUSTNESS))
    if robustness is not None:
        write_json(folder / "robustness.json", robustness.summary())
    write_page(
        folder / "report.html",
        evaluation,
        shards,
        facts=protocol(config, evaluation),
        loss=LOSS_PLOT,
        validation=VALIDATION_PLOT,
        model=load_checkpoint(WEIGHTS),
        robustness=robustness,
        champion=_read(CHAMPION_FIGURES),
    )


def _read(path: Path) -> dict[str, Any]:
    """What a file of JSON holds; nothing where there is none."""
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_bytes()))
    except ValueError as err:
        raise ValueError(f"{path}: not valid JSON ({err}). Delete it and run again.") from err


def calibrate(evaluation: Evaluation, folder: Path) -> None:
    """Learn what scores mean, where enough is labelled."""
    calibration = fit_calibration(
        evaluation.predictions,
        evaluation.truth,
        evaluation.config.keypoint_set,
        models=[sha256_of(WEIGHTS), sha256_of(folder / "model.onnx")],
        about=protocol(evaluation.config, evaluation),
    )
    if calibration is not None:
        calibration.write(folder)
        print(f"scores as probabilities: expected calibration error {calibration.error:.3f}")


def protocol(config: Config, evaluation: Evaluation) -> dict[str, object]:
    """What the figures hold for."""
    return {
        "dataset": config.data.val,
        "persons": len(evaluation.predictions),
        "images with labels": len(evaluation.truth.images),
        "boxes": config.evaluate.boxes.replace("_", " "),
        "flip test": "yes" if config.evaluate.flip_test else "no",
        "crop": "{} x {} pixels (width x height)".format(*config.model.input_size),
        "sigmas of AP": evaluation.config.keypoint_set.sigmas_origin,
        "scores": "box score x mean of the keypoint scores above "
        f"{config.evaluate.keypoint_score_threshold:g}; OKS suppression above {config.evaluate.oks_nms_threshold}",
    }


if __name__ == "__main__":
    sys.exit(main())
