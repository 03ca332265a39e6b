"""`cigpose evaluate`."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from cigpose.cli.arguments import model_file
from cigpose.config import load_params, load_preset


def add_parser(subparsers: Any) -> None:
    """Add the subcommand."""
    evaluate = subparsers.add_parser(
        "evaluate",
        help="figures of a model on a dataset of params.yaml",
        description="Measure a model on a sharded dataset of params.yaml, by its protocol, and print the figures per "
        "part. Nothing but --out is written; the stage `dvc repro evaluate` writes the whole report.",
    )
    evaluate.add_argument(
        "--model", type=model_file, default=Path("data/model/model.safetensors"), help="default: %(default)s"
    )
    evaluate.add_argument("--preset", help="what an official .pth was trained as, see `cigpose presets`")
    evaluate.add_argument("--params", type=Path, default=Path("params.yaml"), help="default: %(default)s")
    evaluate.add_argument("--dataset", help="of params.yaml (default: data.val)")
    evaluate.add_argument("--shards", type=Path, default=Path("data/shards"), help="default: %(default)s")
    evaluate.add_argument("--boxes", choices=("ground_truth", "detections"), help="default: as params.yaml says")
    evaluate.add_argument("--flip-test", action=argparse.BooleanOptionalAction, help="default: as params.yaml says")
    evaluate.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: the GPU if there is one)")
    evaluate.add_argument(
        "--out", type=Path, help="folder for results.json, metrics.json and calibration.json (see `cigpose.Predictor`)"
    )
    evaluate.add_argument(
        "--corruptions", action="store_true", help="also measure blurred, dark, noisy, compressed and occluded crops"
    )
    evaluate.set_defaults(run=_evaluate)


def _evaluate(options: argparse.Namespace) -> None:
    from cigpose.evaluate import report
    from cigpose.evaluate.calibration import fit_calibration
    from cigpose.evaluate.checkpoint import evaluate_checkpoint
    from cigpose.evaluate.robustness import evaluate_corruptions
    from cigpose.files.digest import sha256_of

    config = load_params(options.params)
    if options.preset:  # an official .pth does not say what it is
        preset = load_preset(options.preset)
        config = dataclasses.replace(preset, data=config.data, evaluate=config.evaluate)
    changes = {"boxes": options.boxes, "flip_test": options.flip_test}
    changes = {name: value for name, value in changes.items() if value is not None}
    config = dataclasses.replace(config, evaluate=dataclasses.replace(config.evaluate, **changes))
    evaluation = evaluate_checkpoint(
        options.model,
        config,
        shards_root=options.shards,
        dataset=options.dataset,
        device=options.device,
        results_path=options.out / "results.json" if options.out else None,
    )
    assert evaluation is not None  # one process: this is rank 0
    print(report.parts_table(evaluation.metrics), end="")
    if options.out:
        report.write_metrics_json(evaluation.metrics, options.out / "metrics.json")
        calibration = fit_calibration(
            evaluation.predictions,
            evaluation.truth,
            evaluation.config.keypoint_set,
            models=[sha256_of(options.model)],
            about={"dataset": options.dataset or config.data.val, "flip test": evaluation.config.evaluate.flip_test},
        )
        if calibration is not None:
            calibration.write(options.out)
    if options.corruptions:
        table = evaluate_corruptions(
            options.model,
            config,
            evaluation,
            shards_root=options.shards,
            dataset=options.dataset,
            device=options.device,
        )
        print("\n" + table.to_markdown(), end="")
