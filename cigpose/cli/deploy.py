"""`cigpose predict`."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cigpose.config import Config, load_preset

if TYPE_CHECKING:  # torch: only where it is needed
    from cigpose.deploy.boxes import BoxFile
    from cigpose.deploy.media import Outcome
    from cigpose.deploy.predictor import Predictor
    from cigpose.deploy.results import Results
    from cigpose.deploy.sources import Media

MODEL = Path("data/model/model.safetensors")


def add_parser(subparsers: Any) -> None:
    """Add the subcommand."""
    predict = subparsers.add_parser(
        "predict",
        help="poses in pictures, folders and videos",
        description="Poses of the people in pictures, folders of pictures and videos: drawn, and as JSON. The people "
        "are found by a detector, or their boxes come from a JSON list of detections; without either each whole "
        "picture is taken for one person's box.",
        epilog="Nothing is ever written over but our own results: --out must be new, empty, or of an earlier run with "
        "the same model, sources and options, which then goes on where it stopped. It gets poses.jsonl (a record per "
        "picture, as they are done), poses.json (a COCO result file, at the end), the same for each video under its "
        "name, drawn/, the drawn pictures under their own names, and cigpose-predict.json, which names model, pictures "
        "and keypoints. Where two sources share a name the later one gets a number: imgs, imgs-2. Exit status: 0; 1 if "
        "a picture or part of a video could not be used; 2 if nothing could be done.",
    )
    predict.add_argument(
        "sources",
        nargs="+",
        help="pictures, folders of pictures, videos, patterns such as 'holiday/**/*.jpg'; - is standard input: a "
        "picture, or names of any of these, a line each",
    )
    _add_model(predict)
    predict.add_argument(
        "--out",
        "-o",
        type=Path,
        help="folder to write (default: predictions, or the first of predictions-2, predictions-3, ... that is free or "
        "of the same run)",
    )
    _add_people(predict)
    predict.add_argument(
        "--min-score", type=float, default=0.3, help="draw keypoints from here on (default: %(default)s)"
    )
    predict.add_argument("--no-drawings", action="store_true", help="write the JSON only")
    predict.add_argument(
        "--detect-every",
        type=int,
        default=5,
        metavar="N",
        help="videos: detect in every N-th frame and follow the boxes between (default: %(default)s)",
    )
    predict.add_argument(
        "--smooth", action="store_true", help="videos: take the trembling out of drawn keypoints and of the result file"
    )
    predict.add_argument(
        "--flip-test", action=argparse.BooleanOptionalAction, default=False, help="average with the mirror image"
    )
    predict.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: the GPU if there is one)")
    predict.set_defaults(run=_predict)


def _add_people(predict: argparse.ArgumentParser) -> None:
    """Where boxes come from."""
    people = predict.add_mutually_exclusive_group()
    people.add_argument(
        "--detector",
        help="find the people: a YOLOX or RTMDet as ONNX, or a name of `cigpose detectors list` that was pulled",
    )
    people.add_argument(
        "--boxes", type=Path, help="detections: [{file_name or image_id, bbox [x, y, w, h], score}, ...]"
    )
    people.add_argument(
        "--whole-image", action="store_true", help="each picture is one person's box (default without the other two)"
    )
    predict.add_argument(
        "--min-box-score",
        type=float,
        help="leave out boxes below (default: 0 for --boxes, what `cigpose.deploy.detector` says for --detector)",
    )


def _add_model(parser: argparse.ArgumentParser, help_text: str | None = None) -> None:
    parser.add_argument(
        "--model",
        default=str(MODEL),
        help=help_text
        or "models:/NAME@ALIAS of the registry, a folder with model.safetensors, our .safetensors or .onnx, an .onnx "
        "of cigpose-onnx, or an official .pth (default: %(default)s)",
    )
    parser.add_argument("--preset", help="what an official .pth was trained as, where its name does not say it")


def _config(options: argparse.Namespace) -> Config | None:
    return load_preset(options.preset) if options.preset else None


def _predict(options: argparse.Namespace) -> int:
    from cigpose.cli.detectors import find_detector
    from cigpose.deploy.boxes import BoxFile
    from cigpose.deploy.detector import MIN_SCORE, Detector
    from cigpose.deploy.models import find_model
    from cigpose.deploy.predictor import Predictor
    from cigpose.deploy.results import file_digest, opened_folder
    from cigpose.deploy.sources import find_arguments, find_media

    if options.detect_every < 1:
        raise ValueError(f"--detect-every: {options.detect_every} frames; expected 1 or more.")
    with tempfile.TemporaryDirectory(prefix="cigpose-stdin-") as folder:
        paths, sources = find_arguments(options.sources, sys.stdin.buffer.read, Path(folder))
        media = find_media(paths)
        least = options.min_box_score
        boxes = BoxFile(options.boxes, min_score=least or 0.0) if options.boxes else None
        if boxes:
            boxes.refuse_unmatched(media)
        finder = find_detector(options.detector) if options.detector else None
        detector = Detector(finder, min_score=MIN_SCORE if least is None else least) if finder else None
        model = find_model(options.model)
        loaded = {"device": options.device, "flip_test": options.flip_test, "detector": detector}
        predictor = Predictor.load(model, _config(options), **loaded)
        asked = {
            "model": file_digest(model),
            "calibration": predictor.calibration.digest if predictor.calibration else None,
            "preset": options.preset,
            "flip_test": options.flip_test,
            "boxes": file_digest(options.boxes) if options.boxes else None,
            "detector": file_digest(finder) if finder else None,
            "min_box_score": least,
            "min_score": options.min_score,
            "drawings": not options.no_drawings,
            "detect_every": options.detect_every,
            "smooth": options.smooth,
            "sources": sources,
        }
        try:
            with opened_folder(options.out, asked) as results:
                return _predict_all(options, predictor, media, boxes, results)
        except KeyboardInterrupt:
            print("cigpose: stopped. What is done is kept; the same command goes on from there.", file=sys.stderr)
            raise


def _predict_all(
    options: argparse.Namespace, predictor: Predictor, media: Media, boxes: BoxFile | None, results: Results
) -> int:
    """Pictures first, then each video, and a summary; one that cannot be used does not stop the others."""
    from cigpose.deploy.media import Outcome, predict_pictures
    from cigpose.deploy.sources import utf8
    from cigpose.deploy.video import predict_video

    how: dict[str, Any] = {"boxes": boxes, "draw": not options.no_drawings, "min_score": options.min_score}
    outcomes = [Outcome(skipped=list(media.refused))]
    if media.pictures:
        outcomes.append(predict_pictures(predictor, media.pictures, results, **how))
    how |= {"detect_every": options.detect_every, "smooth": options.smooth}
    for video in media.videos:
        try:
            outcomes.append(outcome := predict_video(predictor, video, results, **how))
        except ValueError as err:
            outcomes.append(Outcome(skipped=[str(err)]))
        else:
            if fresh := outcome.frames - outcome.before:
                print(f"{utf8(video.path)}: {fresh} frames, {fresh / outcome.seconds:.1f} a second")
    skipped = [sentence for outcome in outcomes for sentence in outcome.skipped]
    results.note(**_header(options, predictor), skipped=skipped)
    for sentence in skipped:
        print(f"cigpose: {sentence}", file=sys.stderr)
    for note in _notes(options, predictor):
        print(f"cigpose: note: {note}", file=sys.stderr)
    print(f"{utf8(results.path)}: {_summary(outcomes, len(skipped))}")
    return 1 if skipped else 0


def _summary(outcomes: Sequence[Outcome], problems: int) -> str:
    """`3 persons in 1 picture and 20 frames, 5 of them done before; 1 problem`."""
    frames = sum(outcome.frames for outcome in outcomes)
    pictures = sum(len(outcome.done) for outcome in outcomes if not outcome.frames)
    before = sum(outcome.before for outcome in outcomes)
    places = [_counted(pictures, "picture")] if pictures or not frames else []
    places += [_counted(frames, "frame")] if frames else []
    text = f"{_counted(sum(outcome.persons for outcome in outcomes), 'person')} in {' and '.join(places)}"
    text += f", {before} of them done before" if before else ""
    return text + (f"; {_counted(problems, 'problem')}" if problems else "")


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _notes(options: argparse.Namespace, predictor: Predictor) -> Iterator[str]:
    """What the results do not show, and should not be taken for granted."""
    if not (options.detector or options.boxes or options.whole_image):
        yield "each whole picture was taken for one person's box; --detector finds the people."
    if predictor.calibration is None:
        yield "scores are no probabilities: beside the model is no calibration.json of it, which an evaluation writes."


def _header(options: argparse.Namespace, predictor: Predictor) -> dict[str, Any]:
    """What the result files do not say themselves."""
    keypoints = predictor.keypoint_set
    skeleton = [[first + 1, second + 1] for first, second in keypoints.lines]  # COCO counts from 1
    person = {"id": 1, "name": "person", "keypoints": list(keypoints.names), "skeleton": skeleton}
    return {
        "model": {
            "given": options.model,
            "name": predictor.recipe.name,
            "scores": "probabilities" if predictor.calibration else "raw SimCC scores cut off at 0 and 1",
        },
        "keypoint_set": keypoints.name,
        "keypoints": list(keypoints.names),
        "categories": [person],
        "annotations": [],
    }
