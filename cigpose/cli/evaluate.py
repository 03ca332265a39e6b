"""`cigpose evaluate`."""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cigpose.config import Config, load_params, load_preset

if TYPE_CHECKING:  # torch: only where it is needed
    from torch import nn

    from cigpose.evaluate.coco import ScoredPersons
    from cigpose.evaluate.ground_truth import GroundTruth
    from cigpose.evaluate.predictions import Predictions


def add_parser(subparsers: Any) -> None:
    """Add the subcommand."""
    evaluate = subparsers.add_parser(
        "evaluate",
        help="figures of a model on a dataset of params.yaml",
        description="Measure a model, or the COCO result file of another tool, on a sharded dataset of params.yaml, by "
        "its protocol, and print the figures per part. Nothing but --out is written; the stage `dvc repro evaluate` "
        "writes the whole report.",
    )
    evaluate.add_argument(
        "--model",
        default="data/model/model.safetensors",
        help="models:/NAME@ALIAS of the registry, a .safetensors of ours or a folder with one, an official .pth, an "
        ".onnx that `cigpose export` wrote, or the .json of COCO results of any tool (default: %(default)s)",
    )
    evaluate.add_argument("--against", help="compare with this one, person by person; the same kinds")
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
        "--corruptions",
        action="store_true",
        help="also measure what is retained on changed pictures, as `robustness` in params.yaml says",
    )
    evaluate.set_defaults(run=_evaluate)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Measured:
    metrics: dict[str, float]
    scored: ScoredPersons
    truth: GroundTruth
    config: Config
    model: nn.Module | None
    predictions: Predictions | None
    """Of the model; a file of results has none with raw scores."""
    how: dict[str, object]
    """What the figures hold for."""


def _evaluate(options: argparse.Namespace) -> None:
    from cigpose.deploy.models import find_model
    from cigpose.evaluate import report
    from cigpose.evaluate.paired import compare_models
    from cigpose.evaluate.robustness import measure_robustness
    from cigpose.files.atomic import write_json
    from cigpose.model.device import choose_device

    config = load_params(options.params)
    changes = {"boxes": options.boxes, "flip_test": options.flip_test}
    changes = {name: value for name, value in changes.items() if value is not None}
    data = dataclasses.replace(config.data, val=options.dataset) if options.dataset else config.data
    config = dataclasses.replace(config, data=data, evaluate=dataclasses.replace(config.evaluate, **changes))
    path = find_model(options.model)
    if options.corruptions and path.suffix == ".json":
        raise ValueError(f"{options.model}: a file of results cannot be asked about changed pictures. Give a model.")
    found = _measure(path, config, options, options.out)
    print(f"{options.model}: {', '.join(str(value) for value in found.how.values())}")
    print(report.parts_table(found.metrics), end="")
    metric = config.evaluate.metric
    print(f"{metric} with {found.how['boxes']}: {found.metrics[metric]:.4f}")
    if options.out:
        write_json(options.out / "metrics.json", {**report.nested(found.metrics), "protocol": found.how})
        _calibrate(found, path, options.out)
    if options.against:
        other = _measure(find_model(options.against), config, options)
        names = (str(options.against), str(options.model))
        keypoints = found.config.keypoint_set
        print("\n" + compare_models(other.scored, found.scored, found.truth, keypoints).to_markdown(names), end="")
    if options.corruptions:
        assert found.model is not None
        device = choose_device(options.device)
        kept = measure_robustness(found.model.to(device), found.config, shards_root=options.shards, device=device)
        print("\n" + kept.to_markdown(), end="")


def _measure(path: Path, config: Config, options: argparse.Namespace, out: Path | None = None) -> _Measured:
    """The figures of a model or of a file of results on `config.data.val`."""
    from cigpose.evaluate.checkpoint import evaluate_model, merge_config
    from cigpose.evaluate.coco import measure_persons, score_persons, write_coco_results
    from cigpose.evaluate.labels import dataset_truth, open_shards
    from cigpose.evaluate.results import read_coco_results

    results = out / "results.json" if out else None
    how: dict[str, object] = {"dataset": config.data.val, "sigmas": f"sigmas {config.keypoint_set.sigmas_origin}"}
    if path.suffix == ".json":
        truth = dataset_truth(open_shards(config, config.data.val, options.shards), config)
        scored = read_coco_results(path, truth, config.keypoint_set)
        metrics = measure_persons(scored, truth, config.keypoint_set)
        how |= {"people": f"{len(scored.people)} predicted", "boxes": "boxes of another tool"}
        if results:
            write_coco_results(results, scored, config.keypoint_set, truth.category_id)
        return _Measured(
            metrics=metrics, scored=scored, truth=truth, config=config, model=None, predictions=None, how=how
        )
    model, own = _load(path, config, options.preset)
    own = merge_config(own, config, where=str(path))
    evaluation = evaluate_model(model, own, shards_root=options.shards, device=options.device, results_path=results)
    assert evaluation is not None  # one process: this is rank 0
    scored = score_persons(evaluation.predictions, evaluation.truth, own.keypoint_set, own.evaluate)
    how |= {
        "people": f"{len(evaluation.predictions)} predicted",
        "boxes": "ground-truth boxes" if own.evaluate.boxes == "ground_truth" else "detected boxes",
        "flip test": "flip test" if own.evaluate.flip_test else "no flip test",
    }
    return _Measured(
        metrics=evaluation.metrics,
        scored=scored,
        truth=evaluation.truth,
        config=own,
        model=model,
        predictions=evaluation.predictions,
        how=how,
    )


def _calibrate(found: _Measured, model: Path, out: Path) -> None:
    """Leave in `out` what raw scores of a model's file mean, where enough is labelled."""
    from cigpose.evaluate.calibration import fit_calibration
    from cigpose.files.digest import sha256_of

    if found.predictions is None:
        return
    calibration = fit_calibration(
        found.predictions,
        found.truth,
        found.config.keypoint_set,
        models=[sha256_of(model)],
        about={"dataset": found.config.data.val, "flip test": found.config.evaluate.flip_test},
    )
    if calibration is not None:
        calibration.write(out)


def _load(path: Path, config: Config, preset: str | None) -> tuple[nn.Module, Config]:
    """A model and its own configuration."""
    from cigpose.deploy.onnx import OnnxModel
    from cigpose.model.weights import load_checkpoint

    if path.suffix == ".onnx":
        exported = OnnxModel(path)
        if exported.decoded and config.evaluate.flip_test:
            raise ValueError(
                f"{path}: gives keypoints, whose mean with a mirror image means nothing. Add --no-flip-test."
            )
        return exported, exported.config
    if path.suffix == ".safetensors":
        model = load_checkpoint(path)
    else:  # an official .pth does not say what it is
        model = load_checkpoint(path, load_preset(preset) if preset else config)
    return model, model.config
