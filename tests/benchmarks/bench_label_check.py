"""What `cigpose dataset check` finds of faults put into clean labels; run by hand.

    python tests/benchmarks/bench_label_check.py LABELS [--keypoints NAME] [--cleaned SHARE] [--photos ZIP --model M]

Prints, per kind, the share of the spoilt among the N most suspicious people, N being the number of all the spoilt. A
set's own faults take places among them; `--cleaned 0.2` first leaves out the 20 % that a check of the unspoilt labels
finds most suspicious, which are faults and rare poses.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from spoilt_labels import GEOMETRIC, OF_PICTURES, Spoiler, found_first

from cigpose.dataset.check import check_labels
from cigpose.dataset.check_labels import LabelledPeople, read_labelled_people
from cigpose.dataset.check_pictures import PhotoFolder
from cigpose.dataset.predicted import poses_by
from cigpose.keypoints import KeypointSet, keypoint_set


def main() -> None:
    """Spoil, check, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("labels", type=Path)
    parser.add_argument("--keypoints")
    parser.add_argument("--photos", type=Path)
    parser.add_argument("--model")
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--most", type=int, default=4000, help="people")
    parser.add_argument("--cleaned", type=float, default=0.0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    options = parser.parse_args()
    named = keypoint_set(options.keypoints) if options.keypoints else None
    document = json.loads(options.labels.read_bytes())
    document["annotations"] = document["annotations"][: options.most]
    with tempfile.TemporaryDirectory() as folder:
        if options.cleaned:
            document = without_suspects(document, named, options.cleaned, Path(folder))
        for seed in options.seeds:
            run(document, named, seed, options, Path(folder))


def without_suspects(document: dict, named: KeypointSet | None, share: float, folder: Path) -> dict:
    """The labels without those that a check finds most suspicious."""
    check = check_labels(read(document, named, folder), seed=1000)
    dropped = {s.annotation_id for s in check.suspects[: round(share * len(document["annotations"]))]}
    print(f"{len(dropped)} of {len(document['annotations'])} people left out first", flush=True)
    return document | {"annotations": [a for a in document["annotations"] if a["id"] not in dropped]}


def run(document: dict, named: KeypointSet | None, seed: int, options: argparse.Namespace, folder: Path) -> None:
    """One seed."""
    names = (named or read(document, None, folder).keypoint_set).names
    spoiler = Spoiler(document, names, seed)
    kinds = ("swapped limb", "misplaced", "shifted", *OF_PICTURES) if options.model else GEOMETRIC
    for number, kind in enumerate(kinds):
        spoiler.spoil(kind, (options.faults + number) // len(kinds))
    people, predict = read(spoiler.document, named, folder), None
    if options.model:
        photos = PhotoFolder(mirrored(options.photos, spoiler, folder), people)
        predict = poses_by(options.model, photos)
    began = time.process_time()
    check = check_labels(people, predict=predict)
    shares = found_first(check, spoiler.truth)
    counts = {kind: list(spoiler.truth.values()).count(kind) for kind in shares if kind != "all"}
    print(f"seed {seed}: {len(people)} people, {len(spoiler.truth)} faults, {time.process_time() - began:.1f} CPU s")
    for kind, value in shares.items():
        print(f"  {value:.3f}  {kind} ({counts.get(kind, len(spoiler.truth))})", flush=True)
    blamed = {s.annotation_id: s.findings[0].kind for s in check.suspects if s.annotation_id in spoiler.truth}
    for kind in counts:
        said = [blamed.get(person, "-") for person, its in spoiler.truth.items() if its == kind]
        print(f"    {kind} is called: {', '.join(f'{name} {said.count(name)}' for name in sorted(set(said)))}")


def read(document: dict, named: KeypointSet | None, folder: Path) -> LabelledPeople:
    """Through a file, as users' labels come."""
    path = folder / "labels.json"
    path.write_text(json.dumps(document))
    return read_labelled_people(path, named)


def mirrored(photos: Path, spoiler: Spoiler, folder: Path) -> Path:
    """The zip of pictures with those turned over whose fault that is."""
    target = folder / "photos.zip"
    ids = {image["file_name"]: image["id"] for image in spoiler.document["images"]}
    with zipfile.ZipFile(photos) as source, zipfile.ZipFile(target, "w") as made:
        for name in source.namelist():
            image_id = ids.get(name, ids.get(Path(name).name))
            if image_id is not None:
                made.writestr(name, spoiler.picture(image_id, source.read(name)))
    return target


if __name__ == "__main__":
    main()
