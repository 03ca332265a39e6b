"""`cigpose dataset sigmas`: OKS sigmas of one's own keypoints, estimated."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from cigpose.config import Config, load_params
from cigpose.config.outcome import SigmasConfig
from cigpose.config.params_file import replace_params
from cigpose.files.errors import DataError

if TYPE_CHECKING:
    from cigpose.dataset.sigmas import SigmaEstimate


def add_parser(commands: Any) -> None:
    """Add the subcommand."""
    sigmas = commands.add_parser(
        "sigmas",
        help="OKS sigmas of your own keypoints, estimated",
        description="Estimate OKS sigmas of keypoints that nobody publishes: from people labelled twice (--labels, "
        "--again), else from how far the trained model's predictions on the validation people lie from their labels. "
        "With --write they become `evaluate.sigmas` of params.yaml: `dvc repro` then measures anew, and trains "
        "nothing. Where they come from stands beside each AP.",
    )
    sigmas.add_argument("--pictures", type=Path, help="folder or zip of the pictures of --labels")
    sigmas.add_argument("--labels", type=Path, help="labels; a Label Studio export may hold several of each person")
    sigmas.add_argument("--again", type=Path, help="labels of some of the same people by somebody else")
    sigmas.add_argument(
        "--predictions",
        type=Path,
        default=Path("data/report/predictions.npz"),
        help="of the stage `evaluate`, where nobody is labelled twice (default: %(default)s)",
    )
    sigmas.add_argument("--params", type=Path, default=Path("params.yaml"), help="default: %(default)s")
    sigmas.add_argument("--shards", type=Path, default=Path("data/shards"), help="default: %(default)s")
    sigmas.add_argument("--all", action="store_true", help="of keypoints with published sigmas too")
    sigmas.add_argument("--write", action="store_true", help="into params.yaml; a copy of the one before is kept")
    sigmas.set_defaults(run=_sigmas)


def _sigmas(options: argparse.Namespace) -> None:
    from cigpose.dataset.sigmas import chosen_values, origin_of

    config = load_params(options.params)
    own = dataclasses.replace(config, evaluate=dataclasses.replace(config.evaluate, sigmas=None))
    estimate = _of_repeats(options, own) if options.labels else _of_residuals(options, own)
    values = chosen_values(estimate, own.keypoint_set, everyone=options.all)
    print(_table(own, estimate, values), end="")
    print(f"\n{estimate.method}. {estimate.limits}")
    if not values:
        print("All of them have published sigmas, or too few labels: nothing to write. --all estimates all.")
        return
    sigmas = SigmasConfig(origin=origin_of(own.keypoint_set, values, estimate.method), values=values)
    if not options.write:
        block = {"evaluate": {"sigmas": {"origin": sigmas.origin, "values": values}}}
        print("\n" + yaml.safe_dump(block, sort_keys=False, width=110) + "\n--write puts this into params.yaml.")
        return
    evaluate = dataclasses.replace(config.evaluate, sigmas=sigmas)
    kept = replace_params(dataclasses.replace(config, evaluate=evaluate), options.params)
    print(f"{options.params}: evaluate.sigmas (the one before: {kept}). `dvc repro` measures anew and trains nothing.")


def _of_repeats(options: argparse.Namespace, config: Config) -> SigmaEstimate:
    from cigpose.dataset.reading import Photographs, read_labels
    from cigpose.dataset.sigmas import LEAST_PEOPLE, repeated_people, sigmas_of_repeats

    if options.pictures is None:
        raise ValueError("--labels: say as --pictures which pictures they are of.")
    photographs, names = Photographs(options.pictures), config.keypoint_set.names
    labels = read_labels(options.labels, photographs, names=names)
    again = read_labels(options.again, photographs, names=names) if options.again else None
    for side in filter(None, (labels, again)):
        if side.num_keypoints != len(names):
            raise DataError(f"{side.source}: has {side.num_keypoints} keypoints, {options.params} {len(names)}.")
    first, second, area = repeated_people(labels, again)
    if len(first) < LEAST_PEOPLE:
        raise DataError(
            f"{options.labels}: {len(first)} people are labelled twice, expected {LEAST_PEOPLE} or more. Let somebody "
            "label more of them anew, as --again, or leave out --labels for the residuals of a model."
        )
    return sigmas_of_repeats(first, second, area)


def _of_residuals(options: argparse.Namespace, config: Config) -> SigmaEstimate:
    import numpy as np

    from cigpose.dataset.sigmas import sigmas_of_residuals
    from cigpose.evaluate.labels import dataset_truth, open_shards
    from cigpose.evaluate.predictions import Predictions

    predictions = Predictions.load(options.predictions)
    truth = dataset_truth(open_shards(config, config.data.val, options.shards), config)
    place = {
        key: row for row, key in enumerate(zip(truth.image_id.tolist(), truth.annotation_id.tolist(), strict=True))
    }
    keys = zip(predictions.image_id.tolist(), predictions.person_id.tolist(), strict=True)
    found = [(row, place[key]) for row, key in enumerate(keys) if key in place]
    rows = np.array(found, dtype=np.int64).reshape(-1, 2)
    if config.evaluate.boxes != "ground_truth" or not len(rows):
        raise DataError(
            f"{options.predictions}: holds none of the labelled people of {config.data.val}. Set evaluate.boxes to "
            "ground_truth and run `dvc repro evaluate`."
        )
    if predictions.keypoints.shape[1] != len(config.keypoint_set):
        raise DataError(f"{options.predictions}: is of other keypoints than {options.params}. `dvc repro evaluate`.")
    return sigmas_of_residuals(
        predictions.keypoints[rows[:, 0]].astype(np.float64),
        truth.keypoints[rows[:, 1]],
        truth.area[rows[:, 1]],
        config.keypoint_set,
    )


def _table(config: Config, estimate: SigmaEstimate, values: dict[str, float]) -> str:
    keypoints = config.keypoint_set
    width = max(map(len, keypoints.names))
    lines = [f"{'keypoint':<{width}}  {'now':>6}  {'found':>6}  {'people':>6}"]
    rows = zip(keypoints.names, keypoints.sigmas, estimate.values.tolist(), estimate.counts.tolist(), strict=True)
    for name, now, found, count in rows:
        taken = "taken" if name in values else ""
        lines.append(f"{name:<{width}}  {now:6.3f}  {found:6.3f}  {count:6d}  {taken}".rstrip())
    return f"sigmas of {keypoints.name} now: {keypoints.sigmas_origin}\n" + "\n".join(lines) + "\n"
