"""Makes the reference numbers of this folder from the large set that they are a part of; see README.md.

python tests/golden/make.py ../shared/golden            # into this folder
python tests/golden/make.py ../shared/golden elsewhere  # into another one
"""

from __future__ import annotations

import gzip
import io
import json
import lzma
import sys
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np

HERE = Path(__file__).resolve().parent

EVERY = 17
"""Of a sampled array every 17th value is kept, of the array laid out flat; 17 divides no number of bins or channels."""
SAMPLED_FROM = 2500
"""Arrays of an eval.npz with so many values are sampled."""
EVERY_RATE = 7
"""Of the learning rates at 20 steps an epoch every 7th is kept."""
EVERY_KEYPOINT = 7
"""Of the 133 keypoints after a change of the box every 7th is kept."""
NUM_PIXELS = 128
"""Pixels kept of each crop, each with the square of the picture around the place it is read from."""
REACH = 4
"""Side of that square."""

WHOLE_JSON = (
    "zoo.json", "graphs.json", "metainfo.json", "head_init_statistics.json", "schedules_lr.json",
    "transforms/coco_sample.json", "transforms/coco_wholebody_sample.json", "transforms/crowdpose_sample.json",
    "transforms/half_body.json", "transforms/hsv.json", "transforms/bbox_transform_statistics.json",
    "transforms/coarse_dropout_statistics.json", "eval/*/expected.json", "models/*/state_dict_shapes.json",
)  # fmt: skip
WHOLE_ARRAYS = (
    "ema_*.npz", "schedules_lr_5_iters_per_epoch.npz", "units/*.npz", "transforms/labels_*.npz",
    "transforms/parsed_*.npz", "eval/*/predictions.npz", "models/*/train.npz",
)  # fmt: skip
TRAIN_NUMBERS = (
    "lr", "sequence", "sequence_float64", "small_lr", "grad_norm", "grad_norm_float64", "weight_decay",
    "no_grad_params", "canonical_rows_with_grad",
)  # fmt: skip
FIELDS = ("keypoints", "foot_kpts", "face_kpts", "lefthand_kpts", "righthand_kpts")


def contents(large: Path) -> Iterator[tuple[str, bytes]]:
    """Path and bytes of every file that is made."""

    def files(*patterns: str) -> Iterator[tuple[str, Path]]:
        for pattern in patterns:
            for file in sorted(large.glob(pattern)):
                yield file.relative_to(large).as_posix(), file

    for name, file in files(*WHOLE_JSON):
        yield name, compact(json.loads(file.read_bytes()))
    for name, file in files(*WHOLE_ARRAYS):
        yield name, packed(np.load(file))
    for name, file in files("models/*/train.json"):
        numbers = json.loads(file.read_bytes())
        yield name, compact({key: numbers[key] for key in TRAIN_NUMBERS})
    for name, file in files("models/*/eval.npz"):
        yield name, packed(sampled(np.load(file)))
    for name, file in files("eval/*/gt.json.gz"):
        truth = json.loads(gzip.decompress(file.read_bytes()))
        yield name.replace(".gz", ".xz"), lzma.compress(compact(truth), preset=9)
    for name, file in files("eval/*/results.keypoints.json.gz"):
        yield name.replace(".keypoints.json.gz", ".npz"), packed(chosen_rows(file))
    rates = np.load(large / "schedules_lr.npz")
    yield "schedules_lr.npz", packed({f"{name}[::{EVERY_RATE}]": rates[name][::EVERY_RATE] for name in rates})
    yield from of_transforms(large / "transforms")


def of_transforms(folder: Path) -> Iterator[tuple[str, bytes]]:
    """The arrays of the data pipeline that are not taken whole."""
    affine = dict(np.load(folder / "affine_and_flip.npz"))
    images = json.loads((folder / "coco_wholebody_sample.json").read_bytes())["images"]
    sizes = {image["id"]: (image["width"], image["height"]) for image in images}
    affine["image_wh"] = np.array([sizes[number] for number in affine["img_id"].tolist()])
    yield "transforms/affine_and_flip.npz", packed(affine)
    boxes = {}
    for name, array in np.load(folder / "bbox_transform.npz").items():
        if "keypoints" in name:
            boxes[f"{name}[:, ::{EVERY_KEYPOINT}]"] = array[:, ::EVERY_KEYPOINT]
        else:
            boxes[name] = array
    yield "transforms/bbox_transform.npz", packed(boxes)
    yield "transforms/pixels.npz", packed(pixels(folder))


def compact(value: Any) -> bytes:
    """JSON without blanks; Python writes a float so that it reads back as the same one."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()


def packed(arrays: Mapping[str, np.ndarray]) -> bytes:
    """An `.npz` that `np.load` reads: LZMA, and no time in it, so that equal arrays are equal bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_LZMA) as archive:
        for name in arrays:
            with archive.open(f"{name}.npy", "w") as member:
                np.lib.format.write_array(member, np.asanyarray(arrays[name]), allow_pickle=False)
    return buffer.getvalue()


def sampled(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Small arrays whole; of large ones every 17th value, as `name[::17]`, and of all its values `name[mean, std]`."""
    result = {}
    for name in arrays:
        flat = arrays[name].ravel()
        if flat.size < SAMPLED_FROM:
            result[name] = arrays[name]
        else:
            result[f"{name}[::{EVERY}]"] = flat[::EVERY]
            result[f"{name}[mean, std]"] = np.array([flat.mean(dtype=np.float64), flat.std(dtype=np.float64)])
    return result


def chosen_rows(file: Path) -> dict[str, np.ndarray]:
    """The result file as rows of predictions.npz and scores of persons; refuses if that is not all that it says."""
    predictions = np.load(file.parent / "predictions.npz")
    values = np.concatenate([predictions["keypoints"], predictions["keypoint_scores"][..., None]], axis=2)
    corners = predictions["bbox_xyxy"]
    rows, scores = [], []
    for result in json.loads(gzip.decompress(file.read_bytes())):
        wanted = np.concatenate([np.reshape(result[field], (-1, 3)) for field in FIELDS if field in result])
        same = (predictions["img_id"] == result["image_id"]) & (values == wanted).all(axis=(1, 2))
        row = int(np.flatnonzero(same)[0])
        box = [*corners[row, :2], *(corners[row, 2:] - corners[row, :2])]
        if not np.array_equal(result.get("bbox", box), box):
            raise ValueError(f"{file}: the box of prediction {row} is another one")
        rows.append(row)
        scores.append(result["score"])
    return {"row": np.array(rows), "score": np.array(scores)}


def pixels(folder: Path) -> dict[str, np.ndarray]:
    """Scattered pixels of the crops (BGR), what they are made of, and what changes of HSV make of them."""
    affine, boxes = np.load(folder / "affine_and_flip.npz"), np.load(folder / "bbox_transform.npz")
    row_of = {ann: row for row, ann in enumerate(affine["ann_id"].tolist())}
    cases = {
        f"{tag}_ann{ann}": (ann, affine[f"{tag}/matrix"][row_of[ann]])
        for tag, ann in (("256x192", 442619), ("256x192", 437295), ("256x192", 460541), ("384x288", 437295))
    }
    cases["256x192_ann437295_flipped"] = (437295, affine["flip/256x192/matrix"][row_of[437295]])
    for seed in range(3):
        pick = (boxes["stage1_m_l/ann_id"] == 437295) & (boxes["stage1_m_l/seed"] == seed)
        cases[f"256x192_ann437295_bboxtransform_seed{seed}"] = (437295, boxes["stage1_m_l/matrix_256x192"][pick][0])
    result = {}
    for number, (name, (ann, matrix)) in enumerate(cases.items()):
        image = cv2.imread(str(folder / "images" / f"{affine['img_id'][row_of[ann]]:012d}.png"))
        crop = cv2.imread(str(folder / "crops" / f"{name}.png"))
        place, corner, around = read_from(image, crop, matrix, mirrored="flipped" in name, seed=number)
        result |= {f"{name}/place": place, f"{name}/corner": corner, f"{name}/around": around}
        result[f"{name}/pixel"] = crop[place[:, 1], place[:, 0]]
    place = result["256x192_ann437295/place"]
    for seed in (1, 2, 3):
        changed = cv2.imread(str(folder / "crops" / f"256x192_ann437295_hsv_seed{seed}.png"))
        result[f"256x192_ann437295_hsv_seed{seed}/pixel"] = changed[place[:, 1], place[:, 0]]
    return result


def read_from(
    image: np.ndarray, crop: np.ndarray, matrix: np.ndarray, *, mirrored: bool, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Random pixels of a crop, and the squares of the picture that they are read from.

    Returns: `place` (N, 2) x, y in the crop; `corner` (N, 2) x, y of the square's first pixel in the picture, which may
        lie outside; `around` (N, 4, 4, 3), black outside the picture.
    """
    rng = np.random.RandomState(seed)
    place = np.stack([rng.randint(0, side, NUM_PIXELS) for side in (crop.shape[1], crop.shape[0])], axis=1)
    source = np.linalg.solve(matrix[:, :2], (place - matrix[:, 2]).T).T
    if mirrored:
        source[:, 0] = image.shape[1] - 1 - source[:, 0]
    corner = np.floor(source).astype(np.int64) - 1
    margin = 1000  # no crop reaches further out
    padded = cv2.copyMakeBorder(image, margin, margin, margin, margin, cv2.BORDER_CONSTANT)
    around = np.stack([padded[y : y + REACH, x : x + REACH] for x, y in corner + margin])
    return place.astype(np.int16), corner.astype(np.int16), around


def main() -> None:
    """Write every file."""
    large, folder = Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else HERE
    if not (large / "zoo.json").is_file():
        raise SystemExit(f"{large}: no zoo.json there; name the folder of the large set of reference numbers")
    for name, data in contents(large):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


if __name__ == "__main__":
    main()
