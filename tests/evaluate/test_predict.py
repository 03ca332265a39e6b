from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from cigpose.crop import crop_to_image
from cigpose.evaluate.predict import predict, predict_crops
from cigpose.evaluate.predictions import FIELDS, Predictions
from cigpose.keypoints import COCO


class Fixed(nn.Module):
    """Logits that depend on the mean colour of a crop's left and right half."""

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        x, y = torch.randn(17, 96, generator=generator), torch.randn(17, 128, generator=generator)
        halves = images.mean(dim=(1, 2)).unflatten(1, (2, -1)).mean(dim=2)  # (B, 2)
        return x * halves[:, :1, None] + x.flip(1) * halves[:, 1:, None], y * halves.sum(1)[:, None, None]


def batch(size: int = 3, seed: int = 0) -> dict[str, torch.Tensor]:
    rng = np.random.default_rng(seed)
    return {
        "crops": torch.from_numpy(rng.integers(0, 256, (size, 64, 48, 3), dtype=np.uint8)),
        "keypoints": torch.zeros(size, 17, 2),
        "visible": torch.ones(size, 17),
        "center": torch.from_numpy(rng.uniform(50, 100, (size, 2)).astype(np.float32)),
        "scale": torch.from_numpy(rng.uniform(50, 100, (size, 2)).astype(np.float32)),
        "image_id": torch.arange(size) + 10 * seed,
        "person_id": torch.arange(size) + 100 * seed,
        "bbox_xyxy": torch.rand(size, 4),
        "box_score": torch.rand(size),
    }


def same(first: Predictions, second: Predictions) -> bool:
    return all(np.array_equal(getattr(first, name), getattr(second, name)) for name in FIELDS)


@pytest.mark.parametrize("flip_test", [False, True])
def test_predictions_are_the_decoded_crops_moved_into_the_picture(flip_test: bool) -> None:
    model, rows = Fixed().eval(), batch()
    found = predict(model, [rows], COCO, device="cpu", flip_test=flip_test)
    index = torch.from_numpy(COCO.flip_index) if flip_test else None
    keypoints, scores = predict_crops(model, rows["crops"], index)
    moved = crop_to_image(keypoints, rows["center"].numpy(), rows["scale"].numpy(), (48, 64))
    assert np.array_equal(found.keypoints, moved.astype(np.float32))
    assert np.array_equal(found.keypoint_scores, scores)
    assert np.array_equal(found.person_id, rows["person_id"])


def test_the_flip_test_is_the_mean_with_the_mirrored_crop_as_in_the_reference(golden: Path) -> None:
    from cigpose.model.estimator import forward_flip_test

    case = {name: torch.from_numpy(array) for name, array in np.load(golden / "units" / "flip_vectors.npz").items()}

    class Twice(nn.Module):
        """Zero for the crop, the recorded vectors for its mirror image."""

        def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            mirrored = bool(images[0, 0, 0, 0])
            return case["x"] * mirrored, case["y"] * mirrored

    images = torch.zeros(2, 3, 4, 4)
    images[..., -1] = 1
    simcc_x, simcc_y = forward_flip_test(Twice(), images, case["flip_indices"])
    assert torch.equal(2 * simcc_x, case["out_x"]) and torch.equal(2 * simcc_y, case["out_y"])


def test_batches_are_concatenated_in_order_and_counted() -> None:
    counts: list[int] = []
    batches = [batch(3, seed=1), batch(2, seed=2)]
    together = predict(Fixed(), batches, COCO, device="cpu", flip_test=False, progress=counts.append)
    alone = [predict(Fixed(), [one], COCO, device="cpu", flip_test=False) for one in batches]
    assert counts == [3, 2] and same(together, Predictions.concatenate(alone))


def test_no_batches_give_no_predictions() -> None:
    assert len(predict(Fixed(), [], COCO, device="cpu")) == 0


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_evaluated_and_then_as_before(training: bool) -> None:
    modes: list[bool] = []

    class Watched(Fixed):
        def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            modes.append(self.training)
            return super().forward(images)

    model = Watched().train(training)
    predict(model, [batch()], COCO, device="cpu", flip_test=True)
    assert modes == [False, False] and model.training is training


def test_predictions_survive_a_file_and_equal_ones_have_equal_bytes(tmp_path: Path) -> None:
    made = predict(Fixed(), [batch()], COCO, device="cpu")
    paths = [made.save(tmp_path / name) for name in ("a.npz", "b.npz")]
    assert same(Predictions.load(paths[0]), made)
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_files_that_hold_no_predictions_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no predictions there"):
        Predictions.load(tmp_path / "nothing.npz")
    np.savez(tmp_path / "other.npz", keypoints=np.zeros(3))
    (tmp_path / "text.npz").write_text("text")
    for name in ("other.npz", "text.npz"):
        with pytest.raises(ValueError, match="not a file of predictions"):
            Predictions.load(tmp_path / name)


def test_columns_that_do_not_fit_are_refused() -> None:
    made = predict(Fixed(), [batch()], COCO, device="cpu")
    columns = {name: getattr(made, name) for name in FIELDS}
    with pytest.raises(ValueError, match=r"keypoint_scores has shape \(3, 16\), expected \(3, 17\)"):
        Predictions(**{**columns, "keypoint_scores": made.keypoint_scores[:, 1:]})
    with pytest.raises(ValueError, match="nothing to concatenate"):
        Predictions.concatenate([])
    with pytest.raises(ValueError, match=r"cannot join sets of \[14, 17\]"):
        Predictions.concatenate([made, Predictions.empty(14)])


def test_persons_come_out_in_the_order_of_the_shards_whatever_that_of_the_batches() -> None:
    one, two = batch(3, seed=1), batch(2, seed=2)
    numbered = [{**one, "number": torch.tensor([4, 0, 1])}, {**two, "number": torch.tensor([3, 2])}]
    found = predict(Fixed(), numbered, COCO, device="cpu", flip_test=False)
    plain = predict(Fixed(), [one, two], COCO, device="cpu", flip_test=False)
    assert same(found, plain.select(np.array([1, 2, 4, 3, 0])))
