"""Stage `evaluate`: `python -m pipelines.evaluate` measures data/model on the dataset `data.val`.

data/report/results.json        COCO results, which other tools score identically
data/report/predictions.npz     every person, every keypoint, every score
data/report/report.md           protocol, tables, charts and pictures on one page
data/report/pictures/*.jpg      predictions beside the labels
data/report/model.onnx          the network, checked against torch
data/metrics/evaluate.json      {part: {figure: value}}
data/plots/parts.csv            AP and AR per part
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

from cigpose.config import Config
from cigpose.deploy.onnx import export_onnx
from cigpose.evaluate import report
from cigpose.evaluate.checkpoint import Evaluation, evaluate_checkpoint, open_shards, sample_pictures
from cigpose.model.weights import load_checkpoint
from pipelines.paths import METRICS, PARTS_PLOT, REPORT, SHARDS, WEIGHTS
from pipelines.stage import stage


@stage("evaluate")
def main(config: Config) -> None:
    """Evaluate the trained model."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    evaluation = evaluate_checkpoint(WEIGHTS, config, shards_root=SHARDS, results_path=REPORT / "results.json")
    assert evaluation is not None  # one process: this is rank 0
    write_page(evaluation, REPORT)
    export_onnx(load_checkpoint(WEIGHTS), evaluation.config, REPORT / "model.onnx")
    report.write_parts_csv(evaluation.metrics, PARTS_PLOT)
    report.write_metrics_json(evaluation.metrics, METRICS)
    metric = evaluation.config.evaluate.metric
    print(f"{config.data.val}: {metric} {evaluation.metrics.get(metric, float('nan')):.4f}")
    print(report.parts_table(evaluation.metrics), end="")


def write_page(evaluation: Evaluation, folder: Path) -> Path:
    """Predictions, pictures, charts and the page that shows them."""
    config = evaluation.config
    shards = open_shards(config, config.data.val, SHARDS)
    evaluation.predictions.save(folder / "predictions.npz")
    pages = report.contact_sheets(
        sample_pictures(shards, config.registry.pictures),
        evaluation.predictions,
        config.keypoint_set,
        folder / "pictures",
        truth=evaluation.truth,
    )
    charts = report.write_charts(evaluation.metrics, evaluation.predictions, config.keypoint_set, folder / "charts")
    by_id = config.evaluate.boxes == "ground_truth"
    return report.write_report(
        folder / "report.md",
        title=f"{config.name} on {config.data.val}",
        facts=protocol(config, evaluation),
        metrics=evaluation.metrics,
        pck_table=report.pck(evaluation.predictions, evaluation.truth, config.keypoint_set) if by_id else None,
        pictures=[*charts, *pages],
    )


def protocol(config: Config, evaluation: Evaluation) -> dict[str, object]:
    """What the figures hold for."""
    return {
        "dataset": config.data.val,
        "persons": len(evaluation.predictions),
        "images with labels": len(evaluation.truth.images),
        "boxes": config.evaluate.boxes.replace("_", " "),
        "flip test": "yes" if config.evaluate.flip_test else "no",
        "crop": "{} x {} pixels (width x height)".format(*config.model.input_size),
        "scores": "box score x mean of the keypoint scores above "
        f"{config.evaluate.keypoint_score_threshold:g}; OKS suppression above {config.evaluate.oks_nms_threshold}",
    }


if __name__ == "__main__":
    sys.exit(main())
