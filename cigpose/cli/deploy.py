"""`cigpose predict` and `cigpose export`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cigpose.cli.arguments import model_file
from cigpose.config import Config, load_preset

if TYPE_CHECKING:  # torch: only where it is needed
    from cigpose.deploy.boxes import BoxFile
    from cigpose.deploy.predictor import Predictor
    from cigpose.deploy.results import Results
    from cigpose.deploy.sources import Media

MODEL = Path("data/model/model.safetensors")


def add_parser(subparsers: Any) -> None:
    """Add both subcommands."""
    predict = subparsers.add_parser(
        "predict",
        help="poses in pictures, folders and videos",
        description="Poses of the people in pictures, folders of pictures and videos: drawn, and as JSON. Person boxes "
        "come from a JSON list of detections; without one each whole picture is taken for one person's box.",
        epilog="Nothing is ever written over but our own results: --out must be new, empty, or of an earlier run with "
        "the same model, sources and options, which then goes on where it stopped. It gets poses.jsonl (a record per "
        "picture, as they are done), poses.json (a COCO result file, at the end), the same for each video under its "
        "name, and drawn/, the drawn pictures under their own names. Where two sources share a name the later one gets "
        "a number: imgs, imgs-2. Exit status: 0; 1 if a picture or part of a video could not be used; 2 if nothing "
        "could be done.",
    )
    predict.add_argument("sources", nargs="+", type=Path, help="pictures, folders of pictures, videos")
    _add_model(predict)
    predict.add_argument(
        "--out",
        type=Path,
        help="folder to write (default: predictions, or the first of predictions-2, predictions-3, ... that is free or "
        "of the same run)",
    )
    predict.add_argument(
        "--boxes", type=Path, help="detections: [{file_name or image_id, bbox [x, y, w, h], score}, ...]"
    )
    predict.add_argument(
        "--min-box-score", type=float, default=0.0, help="leave out boxes below (default: %(default)s)"
    )
    predict.add_argument(
        "--min-score", type=float, default=0.3, help="draw keypoints from here on (default: %(default)s)"
    )
    predict.add_argument("--no-drawings", action="store_true", help="write the JSON only")
    predict.add_argument(
        "--flip-test", action=argparse.BooleanOptionalAction, help="default: as the model's params say"
    )
    predict.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: the GPU if there is one)")
    predict.set_defaults(run=_predict)
    export = subparsers.add_parser(
        "export",
        help="write the network as an ONNX file",
        description="Write the network as one ONNX file with a free batch size, and compare it with torch.",
    )
    _add_model(export)
    export.add_argument("--out", type=Path, default=Path("model.onnx"), help="file to write (default: %(default)s)")
    export.add_argument(
        "--decoded", action="store_true", help="uint8 RGB crops in, keypoints and scores out, instead of logits"
    )
    export.set_defaults(run=_export)


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        type=model_file,
        default=MODEL,
        help="our .safetensors or .onnx, a folder of `cigpose models pull`, or an official .pth (default: %(default)s)",
    )
    parser.add_argument("--preset", help="what an official .pth was trained as, see `cigpose presets`")


def _config(options: argparse.Namespace) -> Config | None:
    return load_preset(options.preset) if options.preset else None


def _predict(options: argparse.Namespace) -> int:
    from cigpose.deploy.boxes import BoxFile
    from cigpose.deploy.predictor import Predictor
    from cigpose.deploy.results import file_digest, opened_folder
    from cigpose.deploy.sources import find_media, utf8

    media = find_media(options.sources)
    boxes = BoxFile(options.boxes, min_score=options.min_box_score) if options.boxes else None
    if boxes:
        boxes.refuse_unmatched(media)
    predictor = Predictor.load(options.model, _config(options), device=options.device, flip_test=options.flip_test)
    asked = {
        "model": file_digest(options.model),
        "preset": options.preset,
        "flip_test": options.flip_test,
        "boxes": file_digest(options.boxes) if options.boxes else None,
        "min_box_score": options.min_box_score,
        "min_score": options.min_score,
        "drawings": not options.no_drawings,
        "sources": [utf8(source.resolve()) for source in options.sources],
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
    from cigpose.deploy.media import Outcome, predict_pictures, predict_video
    from cigpose.deploy.sources import utf8

    how: dict[str, Any] = {"boxes": boxes, "draw": not options.no_drawings, "min_score": options.min_score}
    outcomes = [Outcome(skipped=list(media.refused))]
    if media.pictures:
        outcomes.append(predict_pictures(predictor, media.pictures, results, **how))
    for video in media.videos:
        try:
            outcomes.append(predict_video(predictor, video, results, **how))
        except ValueError as err:
            outcomes.append(Outcome(skipped=[str(err)]))
    skipped = [sentence for outcome in outcomes for sentence in outcome.skipped]
    keypoints = predictor.keypoint_set
    results.note(skipped=skipped, keypoint_set=keypoints.name, keypoints=list(keypoints.names))
    for sentence in skipped:
        print(f"cigpose: {sentence}", file=sys.stderr)
    frames = sum(outcome.frames for outcome in outcomes)
    pictures = sum(len(outcome.done) for outcome in outcomes if not outcome.frames)
    print(
        f"{utf8(results.path)}: {sum(outcome.persons for outcome in outcomes)} persons in {pictures} pictures and "
        f"{frames} frames, {sum(outcome.before for outcome in outcomes)} of them done before; {len(skipped)} problems"
    )
    return 1 if skipped else 0


def _export(options: argparse.Namespace) -> None:
    from cigpose.deploy.onnx import export_onnx
    from cigpose.model.weights import load_checkpoint

    model = load_checkpoint(options.model, _config(options))
    path = export_onnx(model, model.config, options.out, decoded=options.decoded)
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB, equal to torch within the tolerance")
