"""`cigpose dataset check`: what is wrong with labels, ranked by suspicion, as a page and as JSON."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cigpose.files.atomic import claimed, clear_leftovers, written_folder

if TYPE_CHECKING:  # torch, OpenCV: only where they are needed
    import numpy as np

    from cigpose.dataset.check import LabelCheck
    from cigpose.dataset.check_pictures import PhotoFolder
    from cigpose.keypoints import KeypointSet

PAGE, TABLE = "check.html", "check.json"
FOLDER = "label-check"
LOCK = Path(f".{FOLDER}.lock")
_NAMED = 8  # suspects in the terminal


def add_parser(commands: Any) -> None:
    """Add the subcommand."""
    check = commands.add_parser(
        "check",
        help="what is wrong with the labels, most suspicious first",
        description="Look for faults in labelled people: left and right exchanged, keypoints misplaced, shifted by "
        "one, outside, people and pictures twice, flags that contradict; with a model also mirrored pictures and "
        "labels of another picture; with a detector people without labels. The set is judged by its own people, "
        "whatever its keypoints. Nothing is changed.",
        epilog="Writes a folder with check.html, a page that needs nothing beside it, and check.json, which has all "
        "suspects with their ids. Exit status: 0 when it ran, whatever it found; 1 if the labels or the pictures "
        "cannot be read; 2 for wrong usage.",
    )
    check.add_argument("pictures", type=Path, help="folder, zip or tar of the pictures")
    check.add_argument("labels", type=Path, help="COCO-keypoints JSON")
    check.add_argument(
        "--out",
        "-o",
        type=Path,
        help=f"folder to write, new or empty (default: {FOLDER}, or the first of {FOLDER}-2, ... that is free)",
    )
    check.add_argument("--top", type=int, default=60, metavar="N", help="suspects to draw (default: %(default)s)")
    check.add_argument("--json", action="store_true", help="print the JSON; a folder is written only if --out names it")
    check.add_argument(
        "--keypoints",
        help="coco, coco_wholebody, crowdpose, or NAME,NAME,... in their order (default: as the file says)",
    )
    check.add_argument("--category", help="whose keypoints, where several categories have some")
    check.add_argument(
        "--model",
        help="compare with a model's poses in the labelled boxes: whatever `cigpose predict` takes; keypoints are "
        "matched by name",
    )
    check.add_argument("--preset", help="what an official .pth was trained as, where its name does not say it")
    check.add_argument(
        "--detector", help="look for people without labels: an ONNX file, or a name of `cigpose detectors list`"
    )
    check.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: the GPU if there is one)")
    check.add_argument("--seed", type=int, default=0, help="of what is learnt of the set (default: %(default)s)")
    check.set_defaults(run=_check)


def _check(options: argparse.Namespace) -> int:
    if options.top < 0:
        raise ValueError(f"--top: {options.top} suspects; expected 0 or more.")
    asked = None if options.out is None else _asked_folder(options)
    try:
        check, photos, facts = _looked_at(options)
    except (ValueError, OSError) as err:
        print(f"cigpose: {err}", file=sys.stderr)
        return 1
    from cigpose.dataset.check_page import label_page, label_report

    report = label_report(check)
    text = json.dumps(report, indent=1) + "\n"
    out = None
    if asked is not None or not options.json:
        page = label_page(check, photos, title=options.labels.name, facts=facts, top=options.top)
        out = _write(asked, {PAGE: page, TABLE: text})
    if options.json:
        print(text, end="")
    else:
        _print_summary(check, report, out)
    return 0


def _asked_folder(options: argparse.Namespace) -> Path:
    """What --out names: a folder in which nothing is, outside the pictures.

    Raises:
        FileExistsError: something is there.
        ValueError: it is within the pictures.
    """
    out: Path = options.out.resolve()
    pictures: Path = options.pictures.resolve()
    if pictures.is_dir() and (out == pictures or pictures in out.parents):
        raise ValueError(f"--out: {options.out} is within the pictures. Nothing is written there; name another folder.")
    _refuse_to_fill(out)
    return out


def _write(asked: Path | None, texts: dict[str, str]) -> Path:
    """Write the folder that was asked for, or the first that is free by then: a check beside may have taken one."""
    with claimed(LOCK if asked is None else asked.with_name(f".{asked.name}.lock"), "writing a label check", wait=True):
        out = _first_free() if asked is None else asked
        clear_leftovers(out)
        _refuse_to_fill(out)
        with written_folder(out) as folder:
            for name, text in texts.items():
                (folder / name).write_text(text, encoding="utf-8")
    return out


def _first_free() -> Path:
    names = (FOLDER, *(f"{FOLDER}-{number}" for number in range(2, 10_000)))
    return next(Path(name) for name in names if _is_free(Path(name)))


def _is_free(folder: Path) -> bool:
    return not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))


def _refuse_to_fill(out: Path) -> None:
    if not _is_free(out):
        raise FileExistsError(f"{out}: is there and not empty. Name a folder that is new, or move it away.")


def _looked_at(options: argparse.Namespace) -> tuple[LabelCheck, PhotoFolder, dict[str, object]]:
    """The check, the pictures, and what was looked at."""
    from cigpose.dataset.check import check_labels
    from cigpose.dataset.check_labels import read_labelled_people
    from cigpose.dataset.check_pictures import PhotoFolder, find_unlabelled
    from cigpose.dataset.predicted import poses_by

    people = read_labelled_people(options.labels, _keypoint_set(options.keypoints), options.category)
    photos = PhotoFolder(options.pictures, people)
    facts: dict[str, object] = {
        "labels": options.labels,
        "pictures": options.pictures,
        "keypoints": f"{len(people.keypoint_set)}, {people.keypoint_set.name}",
        "left and right": f"{len(people.keypoint_set.flip_pairs)} pairs",
        "model": options.model or "none: geometry alone",
        "detector": options.detector or "none",
    }
    predict = None
    if options.model:
        predict = poses_by(options.model, photos, preset=options.preset, device=options.device)
    findings = photos.check()
    if options.detector:
        findings += find_unlabelled(people, _detections(options.detector, photos))
    return check_labels(people, findings=findings, predict=predict, seed=options.seed), photos, facts


def _keypoint_set(text: str | None) -> KeypointSet | None:
    from cigpose.dataset.check_labels import keypoints_of_category
    from cigpose.keypoints import keypoint_set

    if text is None:
        return None
    if "," in text:
        return keypoints_of_category({"keypoints": [name.strip() for name in text.split(",")]}, "--keypoints")
    return keypoint_set(text)


def _detections(given: str, photos: PhotoFolder) -> dict[int, np.ndarray]:
    """Row of the pictures -> boxes and scores."""
    from cigpose.cli.detectors import find_detector
    from cigpose.deploy.detector import Detector
    from cigpose.progress import progress

    detector, found = Detector(find_detector(given)), {}
    for row in progress(range(len(photos.extents)), total=len(photos.extents), desc="detector", unit="image"):
        image = photos.read(row)
        if image is not None:
            found[row] = detector(image)
    return found


def _print_summary(check: LabelCheck, report: dict[str, Any], out: Path | None) -> None:
    print(f"{report['people']:,} people in {report['pictures']:,} pictures; {report['suspicious']:,} are suspicious")
    for kind, count in check.counts().items():
        print(f"  {count:>7,}  {kind}")
    for note in check.notes:
        print(f"  note: {note}")
    for suspect in check.suspects[:_NAMED]:
        if suspect.suspicion >= report["counted_from"]:
            who = f"annotation {suspect.annotation_id}" if suspect.annotation_id is not None else "-"
            why = "; ".join(f"{f.kind}: {f.text}" for f in suspect.findings[:2])
            print(f"  {suspect.suspicion:.2f}  picture {suspect.image_id}, {who}: {why}")
    if out is not None:
        print(f"{out / PAGE}: the page; {out / TABLE}: all of them")
