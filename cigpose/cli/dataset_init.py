"""`cigpose dataset init`: from pictures and labels to a params.yaml that `dvc repro` takes to a registered model."""

from __future__ import annotations

import argparse
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cigpose.config import load_params
from cigpose.config.params_file import is_preset, replace_params
from cigpose.files.errors import DataError

if TYPE_CHECKING:  # torch, OpenCV: only where they are needed
    from cigpose.dataset.plan import Plan
    from cigpose.dataset.raw import Side
    from cigpose.dataset.table import Table


def add_parser(commands: Any) -> None:
    """Add the subcommand."""
    init = commands.add_parser(
        "init",
        help="a params.yaml for your own pictures and labels",
        description="Look at pictures and labels, and write a params.yaml for them: table of keypoints, crop, split, a "
        "model for so many people and this machine. `dvc repro` then goes to a registered model. Labels: COCO "
        "keypoints JSON, Label Studio (JSON), CVAT for images (XML), Ultralytics pose (its data.yaml).",
        epilog="Pictures and labels are only read. data/raw/NAME gets a link to each picture, and the labels as COCO "
        "JSON in two files; the same command does that again after labels were corrected, with --keep-params without "
        "touching params.yaml. A params.yaml that is not as `cigpose use` writes it is only replaced with --force, and "
        "kept beside the new one.",
    )
    init.add_argument("pictures", type=Path, help="folder or zip of the pictures")
    init.add_argument("labels", type=Path, help="file of the labels")
    init.add_argument("--val", type=Path, help="labels to measure on (default: a share of the pictures is held out)")
    init.add_argument("--val-pictures", type=Path, help="folder or zip of their pictures (default: PICTURES)")
    init.add_argument("--val-share", type=float, help="share of the pictures held out (default: by number of people)")
    init.add_argument(
        "--split-by",
        choices=("picture", "folder"),
        default="picture",
        help="folder: pictures of a folder stay together, as frames of a video must (default: %(default)s)",
    )
    init.add_argument("--name", help="of the data, for folders and model (default: as the labels' file)")
    init.add_argument("--keypoints", help="names of the keypoints: coco, crowdpose, or NAME,NAME,... in their order")
    init.add_argument("--category", help="whose keypoints, where several categories have some")
    init.add_argument("--sigmas", type=Path, help="JSON file of keypoint to OKS sigma")
    init.add_argument("--minutes", type=float, help="for training (default: 20 without a GPU, 240 with one)")
    init.add_argument("--epochs", type=int, help="in place of as many as fit into the minutes")
    init.add_argument("--people", type=int, default=23, help="on the sheet of labels (default: %(default)s)")
    init.add_argument("--out", type=Path, default=Path(), help="folder of the project (default: here)")
    keep = init.add_mutually_exclusive_group()
    keep.add_argument("--force", action="store_true", help="replace a params.yaml of yours; a copy of it is kept")
    keep.add_argument("--keep-params", action="store_true", help="read pictures and labels anew, leave params.yaml")
    init.set_defaults(run=_init)


def _init(options: argparse.Namespace) -> None:
    from cigpose.dataset.raw import dataset_keys, refuse_strangers, write_raw
    from cigpose.dataset.table import make_table, names_asked_for, read_sigmas

    name, params = _name(options), options.out / "params.yaml"
    folder = options.out / "data" / "raw" / name
    if options.val_share is not None and not 0 < options.val_share < 1:
        raise ValueError(f"--val-share must be above 0 and below 1, got {options.val_share}.")
    if not options.keep_params:
        _refuse_to_replace(params, options.force)
    elif not params.is_file():
        raise FileNotFoundError(f"{params}: not found, so there is none to keep. Leave out --keep-params.")
    refuse_strangers(folder)
    asked = names_asked_for(options.keypoints) if options.keypoints else None
    sides = _sides(options, asked)
    table = make_table(sides[0].labels, name, asked, read_sigmas(options.sigmas) if options.sigmas else None)
    _check_val(sides, table)
    origin = {"pictures": str(options.pictures.absolute()), "labels": str(options.labels.absolute())}
    if options.keep_params:
        names = load_params(params).keypoint_set.names
        if set(dataset_keys(name)) - load_params(params).data.datasets.keys() or names != table.keypoints.names:
            raise DataError(f"{params}: is not of these labels ({name}). Leave out --keep-params.")
        write_raw(folder, sides, names, origin)
        print(f"{folder}: {len(sides[0].people)} people to train on, {len(sides[1].people)} to measure on")
        return
    plan = _plan(options, name, sides, table)
    sheet = options.out / "data" / f"{name}-labels.jpg"
    _draw(sheet, sides, table, options.people)
    print(_summary(sides, table, plan), end="")
    write_raw(folder, sides, table.keypoints.names, origin)
    kept = replace_params(plan.config, params)
    print(f"\n{folder}: links to the pictures, and the labels as COCO JSON")
    print(f"{sheet}: look at it first; swapped sides and wrong orders show there")
    print(f"{params}: {plan.config.name}" + (f" (the one before: {kept})" if kept else ""))
    if not (options.out / "dvc.yaml").is_file():
        print(f"{options.out.absolute()}: has no dvc.yaml, so it is no copy of the project: run `dvc repro` in one.")
    print("`dvc repro` now makes shards, trains, evaluates and registers. `cigpose dataset check` looks for faults.")


def _name(options: argparse.Namespace) -> str:
    """Name of the data: letters, digits and dashes."""
    text = options.name or options.labels.resolve().stem
    if not options.name and text.lower() in {"train", "labels", "data", "annotations", "instances", "result", "export"}:
        text = options.pictures.resolve().stem
        if text.lower() in {"images", "photos", "pictures", "train", "data"}:
            text = options.pictures.resolve().parent.name
    name = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "people"
    if options.name and name != options.name:
        raise ValueError(f"--name: {options.name!r} cannot name folders. Use small letters, digits and dashes: {name}.")
    return name


def _refuse_to_replace(params: Path, force: bool) -> None:
    """See that a params.yaml is not there, holds nothing of the user's, or may be replaced."""
    if force or not params.exists():
        return
    if not is_preset(params):
        raise ValueError(f"{params}: is there already and is yours. --force replaces it and keeps a copy.")


def _sides(options: argparse.Namespace, names: tuple[str, ...] | None) -> list[Side]:
    """Pictures to train on and to measure on, with their labels."""
    from cigpose.dataset.raw import Side
    from cigpose.dataset.reading import Photographs, read_labels
    from cigpose.dataset.split import held_out_share, refuse_shared_pictures, split_pictures

    photographs = Photographs(options.pictures)
    labels = read_labels(options.labels, photographs, options.category, names)
    if options.val is None:
        share = held_out_share(labels.num_people) if options.val_share is None else options.val_share
        train, val = split_pictures(labels, share, options.split_by)
        return [Side(labels=labels, images=images, photographs=photographs) for images in (train, val)]
    others = Photographs(options.val_pictures) if options.val_pictures else photographs
    held = read_labels(options.val, others, options.category, names)
    if others.path.resolve() == photographs.path.resolve():
        refuse_shared_pictures(labels.images, held.images, str(options.val))
    return [
        Side(labels=labels, images=labels.images, photographs=photographs),
        Side(labels=held, images=held.images, photographs=others),
    ]


def _check_val(sides: list[Side], table: Table) -> None:
    """See that a file to measure on has the same keypoints as the one to train on."""
    labels, held = sides[0].labels, sides[1].labels
    if held is labels:
        return
    if held.num_keypoints != labels.num_keypoints or (held.names and labels.names and held.names != labels.names):
        raise DataError(
            f"{held.source}: its {held.num_keypoints} keypoints are not those of {labels.source} "
            f"({', '.join(table.keypoints.names)}). Give labels of the same kind as --val."
        )
    held.edges = held.edges or labels.edges


def _plan(options: argparse.Namespace, name: str, sides: list[Side], table: Table) -> Plan:
    import numpy as np

    from cigpose.dataset.plan import Machine, make_plan
    from cigpose.dataset.raw import datasets_of
    from cigpose.dataset.speed import measure_people_per_second

    train, val = (side.people for side in sides)
    file_names = {image["id"]: image["file_name"] for image in sides[0].images}
    some = [(file_names[person["image_id"]], person["bbox"]) for person in train[:: max(1, len(train) // 16)]]
    machine = Machine.here()
    return make_plan(
        name=name,
        table=table,
        boxes_xywh=np.array([person["bbox"] for person in train], dtype=np.float64),
        num_train=len(train),
        num_val=len(val),
        datasets=datasets_of(name, sides),
        has_areas=_has_areas(train),
        machine=machine,
        minutes=options.minutes or machine.minutes,
        measure_speed=lambda config: measure_people_per_second(config, sides[0].photographs, some),
        epochs=options.epochs,
    )


def _has_areas(people: list[dict[str, Any]]) -> bool:
    """Whether areas are something else than those of the boxes."""
    equal = [math.isclose(p["area"], p["bbox"][2] * p["bbox"][3], rel_tol=0.02) for p in people if p["bbox"][2] > 0]
    return not equal or sum(equal) < 0.9 * len(equal)


def _draw(path: Path, sides: list[Side], table: Table, count: int) -> None:
    import cv2

    from cigpose.dataset.sheet import draw_labels
    from cigpose.files.atomic import write_bytes

    sheet = draw_labels(sides, table.keypoints, count)
    write_bytes(path, cv2.imencode(".jpg", sheet)[1].tobytes())


def _summary(sides: list[Side], table: Table, plan: Plan) -> str:
    """What a user must see before the hours of training."""
    keypoints, labels = table.keypoints, sides[0].labels
    names = keypoints.names
    pairs = [f"{names[a]} - {names[b]}" for a, b in keypoints.flip_pairs]
    groups = [" ".join(names[k] for k in group) for group in keypoints.groups]
    lines = [
        f"{labels.source}: {labels.kind}",
        f"people     {len(sides[0].people)} to train on, on {len(sides[0].images)} pictures; "
        f"{len(sides[1].people)} to measure on, on {len(sides[1].images)}",
        f"keypoints  {len(names)} ({keypoints.name}): {_listed(list(names), ', ')}",
        f"mates      {_listed(pairs, ', ') or 'none: nothing is mirrored'}",
        f"skeleton   {len(keypoints.lines)} lines",
        f"groups     {_listed(groups, '; ')}",
        f"sigmas     {keypoints.sigmas_origin}",
        *(reason.replace(": ", " " * max(1, 10 - reason.index(":")), 1) for reason in plan.reasons),
        _time(plan),
    ]
    notes = list(dict.fromkeys([*labels.notes, *sides[1].labels.notes, *table.notes, *_doubts(sides, plan)]))
    return "\n".join([*lines, *(["", "assumed:"] if notes else []), *(f"- {note}" for note in notes)]) + "\n"


def _listed(items: list[str], separator: str, most: int = 24) -> str:
    more = [f"... {len(items) - most} more"] if len(items) > most else []
    return separator.join([*items[:most], *more])


def _time(plan: Plan) -> str:
    from cigpose.dataset.plan import Machine

    return (
        f"time       about {max(1, round(plan.seconds / 60))} minutes of training on this machine "
        f"({Machine.here().words}; {plan.people_per_second:.0f} people a second just now), and some for the rest"
    )


def _doubts(sides: list[Side], plan: Plan) -> list[str]:
    """What else the figures rest on."""
    doubts = []
    if sides[0].labels is sides[1].labels and not sides[0].labels.sides:
        doubts.append(
            "Pictures were split one by one, by their names. Frames of a video, or several pictures of one scene, must "
            "stay together: --split-by folder, or a file of your own as --val."
        )
    if plan.config.evaluate.area == "box":
        doubts.append("Areas are those of the boxes: AP takes 0.53 of them, as CrowdPose does (evaluate.area).")
    few = len(sides[1].people)
    if few < 100:
        doubts.append(f"An AP over {few} people has an interval of some tenths; the report states it.")
    return doubts
