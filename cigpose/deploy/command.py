"""`cigpose predict` and `cigpose export`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from cigpose.config import Config, load_preset

MODEL = Path("data/model/model.safetensors")


def add_parser(subparsers: Any) -> None:
    """Add both subcommands."""
    predict = subparsers.add_parser(
        "predict",
        help="poses in pictures, folders and videos",
        description="Poses of the people in pictures, folders of pictures and videos: drawn, and as JSON. Person boxes "
        "come from a JSON list of detections; without one each whole picture is taken for one person's box.",
    )
    predict.add_argument("sources", nargs="+", type=Path, help="pictures, folders of pictures, videos")
    _add_model(predict)
    predict.add_argument("--out", type=Path, default=Path("predictions"), help="folder to write (default: %(default)s)")
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
        type=Path,
        default=MODEL,
        help="our .safetensors or .onnx, or an official .pth (default: %(default)s)",
    )
    parser.add_argument("--preset", help="what an official .pth was trained as, see `cigpose presets`")


def _config(options: argparse.Namespace) -> Config | None:
    return load_preset(options.preset) if options.preset else None


def _predict(options: argparse.Namespace) -> None:
    from cigpose.deploy.media import VIDEOS, BoxFile, predict_pictures, predict_video
    from cigpose.deploy.predictor import Predictor

    boxes = BoxFile(options.boxes, min_score=options.min_box_score) if options.boxes else None
    missing = [str(source) for source in options.sources if not source.exists()]
    if missing:
        raise FileNotFoundError(f"{', '.join(missing)}: no such picture, folder or video.")
    predictor = Predictor.load(options.model, _config(options), device=options.device, flip_test=options.flip_test)
    for source in options.sources:
        # Several folders may hold equal names, so each source gets a folder of its own.
        out = options.out if len(options.sources) == 1 else options.out / source.stem
        run = predict_video if source.suffix.lower() in VIDEOS else predict_pictures
        written = run(predictor, source, out, boxes=boxes, draw=not options.no_drawings, min_score=options.min_score)
        print(f"{source}: {written}")


def _export(options: argparse.Namespace) -> None:
    from cigpose.deploy.onnx import export_onnx
    from cigpose.model.weights import load_checkpoint

    model = load_checkpoint(options.model, _config(options))
    path = export_onnx(model, model.config, options.out, decoded=options.decoded)
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB, equal to torch within the tolerance")
