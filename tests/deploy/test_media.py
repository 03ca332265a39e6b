from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from pycocotools.coco import COCO

from cigpose.cli.main import main
from cigpose.config import Config
from cigpose.deploy import ahead, media, video
from cigpose.deploy.boxes import BoxFile
from cigpose.deploy.predictor import Predictor
from cigpose.model.estimator import PoseEstimator, build_model
from cigpose.model.weights import save_weights

Predict = Callable[..., int]


@pytest.fixture
def predict(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Predict]:
    """`cigpose predict` in `tmp_path`."""
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more only wait for each other on so small a network
    yield lambda *arguments: main(["predict", *map(str, arguments), "--model", str(checkpoint), "--device", "cpu"])
    torch.set_num_threads(threads)


@pytest.fixture
def album(tmp_path: Path, picture: np.ndarray) -> Path:
    folder = tmp_path / "album"
    (folder / "summer").mkdir(parents=True)
    cv2.imwrite(str(folder / "000000000007.jpg"), picture)
    cv2.imwrite(str(folder / "summer" / "beach.png"), picture[:60])
    (folder / "notes.txt").write_text("not a picture")
    return folder


def write_film(path: Path, picture: np.ndarray, frames: int = 20, codec: str = "mp4v") -> Path:
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*codec), 10.0, (160, 120))
    for shift in range(frames):
        writer.write(np.roll(picture, shift, axis=1))
    writer.release()
    return path


@pytest.fixture
def film(tmp_path: Path, picture: np.ndarray) -> Path:
    return write_film(tmp_path / "film.mp4", picture)


def boxes(path: Path, *entries: dict) -> Path:
    path.write_text(json.dumps(entries))
    return path


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and not path.is_symlink()}


# --- what is written ---


def test_a_folder_gives_a_record_a_result_and_a_drawing_per_picture(
    predict: Predict, album: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert predict(album, "--out", out) == 0
    assert capsys.readouterr().out == f"{out}: 2 persons in 2 pictures\n"
    records = lines(out / "poses.jsonl")
    assert [record["file_name"] for record in records] == ["000000000007.jpg", "summer/beach.png"]
    assert np.shape(records[0]["persons"][0]["keypoints"]) == (133, 3)
    assert records[1]["persons"][0]["bbox_xyxy"] == [0, 0, 160, 60]
    drawn = cv2.imread(str(out / "drawn" / "summer" / "beach.png"))
    assert drawn is not None and drawn.shape == (60, 160, 3)
    about = json.loads((out / "cigpose-predict.json").read_text())
    assert len(about["keypoints"]) == 133 and [image["id"] for image in about["images"]] == [1, 2]
    truth = COCO()
    truth.dataset = {"images": about["images"], "annotations": [], "categories": [{"id": 1, "name": "person"}]}
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        loaded = truth.loadRes(str(out / "poses.json"))
    assert len(loaded.anns) == 2 and len(loaded.anns[1]["keypoints"]) == 51 and len(loaded.anns[1]["face_kpts"]) == 204


def test_pictures_that_are_numbers_keep_them_as_ids(predict: Predict, album: Path, tmp_path: Path) -> None:
    shutil.rmtree(album / "summer")
    assert predict(album, "--out", tmp_path / "out", "--no-drawings") == 0
    assert [entry["image_id"] for entry in json.loads((tmp_path / "out" / "poses.json").read_text())] == [7]
    assert not (tmp_path / "out" / "drawn").exists()


def test_boxes_are_found_by_name_by_last_part_and_by_number(predict: Predict, album: Path, tmp_path: Path) -> None:
    given = boxes(
        tmp_path / "boxes.json",
        {"image_id": 7, "bbox": [10, 10, 40, 80], "score": 0.9},
        {"image_id": 7, "bbox": [60, 10, 40, 80], "score": 0.8, "category_id": 1},
        {"image_id": 7, "bbox": [60, 10, 40, 80], "score": 0.8, "category_id": 18},
        {"image_id": 7, "bbox": [90, 10, 40, 80], "score": 0.1},
        {"file_name": "beach.png", "bbox": [5, 5, 30, 50]},
    )
    assert predict(album, "--out", tmp_path / "out", "--boxes", given, "--min-box-score", 0.2, "--no-drawings") == 0
    records = lines(tmp_path / "out" / "poses.jsonl")
    assert [person["bbox_xyxy"] for person in records[0]["persons"]] == [[10, 10, 50, 90], [60, 10, 100, 90]]
    assert [len(record["persons"]) for record in records] == [2, 1]


def test_a_video_gives_a_record_per_frame_and_a_video(predict: Predict, film: Path, tmp_path: Path) -> None:
    given = boxes(tmp_path / "boxes.json", {"image_id": 3, "bbox": [5, 5, 30, 50]})
    assert predict(film, "--out", tmp_path / "out", "--boxes", given) == 0
    records = lines(tmp_path / "out" / "film.jsonl")
    assert [record["frame"] for record in records] == list(range(20))
    assert [len(record["persons"]) for record in records] == [int(frame == 3) for frame in range(20)]
    assert records[5]["time_s"] == 0.5
    assert [entry["image_id"] for entry in json.loads((tmp_path / "out" / "film.json").read_text())] == [3]
    drawn = cv2.VideoCapture(str(tmp_path / "out" / "drawn" / "film.mp4"))
    assert (drawn.get(cv2.CAP_PROP_FRAME_COUNT), drawn.get(cv2.CAP_PROP_FPS)) == (20, 10)


def test_sources_of_one_name_have_results_of_their_own(
    predict: Predict, film: Path, tmp_path: Path, picture: np.ndarray
) -> None:
    for number, folder in enumerate(("a/imgs", "b/imgs")):
        (tmp_path / folder).mkdir(parents=True)
        cv2.imwrite(str(tmp_path / folder / "x.jpg"), picture[: 60 + number])
        cv2.imwrite(str(tmp_path / folder / "x.png"), picture[: 70 + number])
    shutil.copy(film, tmp_path / "poses.mp4")
    shutil.copy(film, tmp_path / "a" / "film.mp4")
    sources = ["a/imgs", "b/imgs", "b/imgs/x.jpg", film, "a/film.mp4", "poses.mp4", "a/imgs"]
    assert predict(*sources, "--out", "out") == 0
    heights = {record["file_name"]: record["height"] for record in lines(tmp_path / "out" / "poses.jsonl")}
    assert heights == {"imgs/x.jpg": 60, "imgs/x.png": 70, "imgs-2/x.jpg": 61, "imgs-2/x.png": 71, "x.jpg": 61}
    for name, height in heights.items():
        assert cv2.imread(str(tmp_path / "out" / "drawn" / name)).shape[0] == height
    assert {path.name for path in (tmp_path / "out").glob("*.json*")} == {
        *("cigpose-predict.json", "poses.json", "poses.jsonl", "film.json", "film.jsonl"),
        *("film-2.json", "film-2.jsonl", "poses-2.json", "poses-2.jsonl"),
    }


# --- nothing of the user's is written over ---


@pytest.mark.parametrize("out", [".", "link", "album/../", "album", "album/summer"])
def test_no_source_is_ever_written_over(
    predict: Predict, album: Path, film: Path, tmp_path: Path, out: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    shutil.copy(album / "000000000007.jpg", tmp_path / "photo.jpg")
    before = contents(tmp_path)
    for source in ("photo.jpg", film, album, "album/summer/beach.png"):
        assert predict(source, "--out", out) == 2
        error = capsys.readouterr().err
        assert "holds files that `cigpose predict` did not write" in error and "Give a new or empty folder" in error
    assert contents(tmp_path) == before


def test_a_link_out_of_our_folder_is_not_followed(predict: Predict, album: Path, tmp_path: Path, capsys) -> None:
    assert predict(album, "--out", "out") == 0
    shutil.rmtree(tmp_path / "out" / "drawn")
    (tmp_path / "out" / "drawn").symlink_to(album)
    os.utime(album / "000000000007.jpg")  # it changed: its drawing is due again
    before = contents(album)
    assert predict(album, "--out", "out") == 1
    assert "a link leads from there out of out" in capsys.readouterr().err
    assert contents(album) == before


def test_a_file_of_the_users_among_our_results_stays(
    predict: Predict, album: Path, tmp_path: Path, picture: np.ndarray, capsys: pytest.CaptureFixture[str]
) -> None:
    assert predict(album, "--out", "out") == 0
    theirs = tmp_path / "out" / "drawn" / "new.jpg"
    theirs.write_text("mine")
    cv2.imwrite(str(album / "new.jpg"), picture)
    assert predict(album, "--out", "out") == 1
    assert "new.jpg: exists, and `cigpose predict` did not write it" in capsys.readouterr().err
    assert theirs.read_text() == "mine"


def test_results_within_the_source_are_not_predicted(predict: Predict, album: Path) -> None:
    for out in ("album/poses", "album/poses", "album/again"):
        assert predict(album, "--out", out) == 0
    assert len(lines(album / "again" / "poses.jsonl")) == 2


# --- stopped, started again, twice at once ---


def test_another_run_is_refused_or_gets_a_folder_of_its_own(
    predict: Predict, model: PoseEstimator, config: Config, album: Path, tmp_path: Path, capsys
) -> None:
    photo = album / "000000000007.jpg"
    assert predict(photo) == predict(photo) == predict(album) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in printed] == ["predictions", "predictions", "predictions-2"]
    assert "1 of them done before" in printed[1]
    assert predict(photo, "--out", "predictions", "--min-score", 0.1) == 2
    assert "holds the results of another run, which differs in min_score" in capsys.readouterr().err
    save_weights(tmp_path / "other.safetensors", build_model(config).state_dict(), config)
    assert main(["predict", str(photo), "--model", "other.safetensors", "--out", "predictions"]) == 2
    assert "which differs in model" in capsys.readouterr().err


def test_a_broken_picture_is_reported_and_the_others_are_done(
    predict: Predict, album: Path, picture: np.ndarray, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (album / "broken.jpg").write_bytes(b"broken")
    assert predict(album, "--out", "out") == 1
    captured = capsys.readouterr()
    assert "broken.jpg: OpenCV cannot decode these 6 bytes" in captured.err
    assert "2 persons in 2 pictures; 1 problem\n" in captured.out
    assert len(json.loads((tmp_path / "out" / "poses.json").read_text())) == 2
    cv2.imwrite(str(album / "broken.jpg"), picture)
    assert predict(album, "--out", "out") == 0
    assert "3 persons in 3 pictures, 2 of them done before\n" in capsys.readouterr().out


def test_a_changed_picture_is_predicted_again(
    predict: Predict, album: Path, picture: np.ndarray, tmp_path: Path
) -> None:
    assert predict(album, "--out", "out") == 0
    cv2.imwrite(str(album / "000000000007.jpg"), picture[:40])
    assert predict(album, "--out", "out") == 0
    assert [record["height"] for record in lines(tmp_path / "out" / "poses.jsonl")] == [120, 60, 40]
    assert cv2.imread(str(tmp_path / "out" / "drawn" / "000000000007.jpg")).shape[0] == 40
    assert len(json.loads((tmp_path / "out" / "poses.json").read_text())) == 2


def test_a_stopped_run_goes_on_and_ends_with_the_same_bytes(
    predict: Predict, album: Path, film: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setattr(media, "PICTURES_AT_ONCE", 1)
    monkeypatch.setattr(video, "FRAMES_AT_ONCE", 1)
    assert predict(album, film, "--out", "whole") == 0
    many, calls = Predictor.predict_many, []

    def stopped_at(call: int) -> Callable:
        def predict_many(self, images, wanted):
            calls.append(len(images := list(images)))
            if len(calls) == call:
                raise KeyboardInterrupt
            return many(self, images, wanted)

        return predict_many

    for call in (2, 6):  # at the second picture, then within the video
        calls.clear()
        monkeypatch.setattr(Predictor, "predict_many", stopped_at(call))
        assert predict(album, film, "--out", "out") == 130
        assert "the same command goes on from there" in capsys.readouterr().err
    assert len(lines(tmp_path / "out" / "film.jsonl")) == 4
    with (tmp_path / "out" / "film.jsonl").open("ab") as file:
        file.write(b'{"frame": 4, "per')  # a kill in the middle of a line
    (tmp_path / "out" / "drawn" / ".film.mp4.0123abcd.part").touch()  # and of a video
    calls.clear()
    monkeypatch.setattr(Predictor, "predict_many", stopped_at(0))
    assert predict(album, film, "--out", "out") == 0
    assert sum(calls) == 16
    asked = {"cigpose-predict.json", ".cigpose-predict.lock"}
    own, expected = (
        {path.relative_to(folder): content for path, content in contents(folder).items() if path.name not in asked}
        for folder in (tmp_path / "out", tmp_path / "whole")
    )
    assert own == expected


@pytest.mark.slow  # two processes
def test_a_killed_process_loses_no_picture_that_was_done(
    checkpoint: Path, tmp_path: Path, picture: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "many").mkdir()
    for number in range(240):
        cv2.imwrite(str(tmp_path / "many" / f"{number}.jpg"), picture)
    command = [
        sys.executable,
        "-m",
        "cigpose.cli.main",
        "predict",
        "many",
        "--model",
        str(checkpoint),
        "--device",
        "cpu",
    ]
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    process = subprocess.Popen([*command, "--no-drawings"], cwd=tmp_path)
    journal = tmp_path / "predictions" / "poses.jsonl"
    deadline = time.monotonic() + 60
    while not (journal.exists() and journal.stat().st_size) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL
    done = journal.read_bytes().count(b"\n")
    assert 16 <= done < 240
    again = subprocess.run([*command, "--no-drawings"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert again.stdout == (f"predictions: 240 persons in 240 pictures, {done} of them done before\n")
    assert len(json.loads((tmp_path / "predictions" / "poses.json").read_text())) == 240


# --- what may be asked for ---


def test_the_header_is_a_coco_file_that_takes_the_results(
    predict: Predict, album: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert predict(album, "--out", "out", "--no-drawings", "--whole-image") == 0
    header = tmp_path / "out" / "cigpose-predict.json"
    with contextlib.redirect_stdout(io.StringIO()):
        loaded = COCO(str(header)).loadRes(str(tmp_path / "out" / "poses.json"))
    assert len(loaded.anns) == 2 and loaded.cats[1]["keypoints"][9] == "left_wrist"
    model = json.loads(header.read_text())["model"]
    assert model["name"] == "quickstart" and model["scores"] == "raw SimCC scores cut off at 0 and 1"
    notes = capsys.readouterr().err
    assert "scores are no probabilities" in notes and "--detector" not in notes
    assert predict(album, "--out", "again", "--no-drawings") == 0
    assert "each whole picture was taken for one person's box; --detector finds" in capsys.readouterr().err


def test_patterns_and_names_from_standard_input_are_sources(
    predict: Predict, album: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    assert predict("album/**/*", "--out", "out", "--no-drawings") == 0  # not notes.txt
    found = [record["file_name"] for record in lines(tmp_path / "out" / "poses.jsonl")]
    assert found == ["000000000007.jpg", "beach.png"]
    capsys.readouterr()
    assert predict("album/*.gif") == 2
    assert capsys.readouterr().err == "cigpose: album/*.gif: no picture, folder or video has a name of this form.\n"
    names = io.BytesIO(b"album/000000000007.jpg\n\nalbum/summer/*.png\n")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(names))
    assert predict("-", "--out", "listed", "--no-drawings") == 0
    found = [record["file_name"] for record in lines(tmp_path / "listed" / "poses.jsonl")]
    assert found == ["000000000007.jpg", "beach.png"]


def test_a_picture_from_standard_input_goes_on_as_itself(
    predict: Predict, album: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    for content in [(album / "summer" / "beach.png").read_bytes()] * 2:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
        assert predict("-", "--out", "out") == 0
    assert "1 person in 1 picture, 1 of them done before\n" in capsys.readouterr().out
    assert (tmp_path / "out" / "drawn" / "stdin.png").is_file()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\0\1\2")))
    assert predict("-") == 2
    assert "standard input: neither a picture nor names" in capsys.readouterr().err


def test_a_detector_that_was_not_pulled_is_named(predict: Predict, album: Path, capsys, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "home"))
    assert predict(album, "--detector", "yolox-m") == 2
    assert capsys.readouterr().err == ("cigpose: yolox-m: not pulled yet. Run `cigpose detectors pull yolox-m`.\n")
    assert predict(album, "--detector", "yolox-z.onnx") == 2
    assert (
        "yolox-z.onnx: no such detector. Give an ONNX file, or one of yolox-nano, yolox-m." in capsys.readouterr().err
    )


def test_pictures_at_once_are_those_that_the_memory_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    order, threads = [], set()

    def read(number: int) -> int:
        threads.add(threading.current_thread().name)
        return number

    for number in ahead.mapped_ahead(read, (order.append(n) or n for n in range(50))):
        assert order[-1] - number <= ahead.num_threads() + 1
    assert order == list(range(50)) and threading.current_thread().name not in threads


def test_two_at_once_do_not_write_into_one_folder(
    predict: Predict, album: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert predict(album, "--out", "out") == 0
    with (tmp_path / "out" / ".cigpose-predict.lock").open("a+") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert predict(album, "--out", "out") == 2
    assert "a `cigpose predict` into out is running already" in capsys.readouterr().err


def test_a_journal_that_is_none_is_refused(predict: Predict, album: Path, tmp_path: Path, capsys) -> None:
    assert predict(album, "--out", "out") == 0
    (tmp_path / "out" / "poses.jsonl").write_text("hello\n")
    assert predict(album, "--out", "out") == 2
    assert "poses.jsonl: line 1 is no record of `cigpose predict`" in capsys.readouterr().err
    (tmp_path / "out" / "cigpose-predict.json").write_text("{}")
    assert predict(album, "--out", "out") == 2
    assert "cigpose-predict.json: not written by `cigpose predict`" in capsys.readouterr().err


# --- sources and boxes that cannot be used ---


def test_a_cut_video_says_how_much_of_it_is_there(
    predict: Predict, tmp_path: Path, picture: np.ndarray, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = write_film(tmp_path / "whole.avi", picture, 60, "MJPG").read_bytes()
    (tmp_path / "cut.avi").write_bytes(whole[: len(whole) // 2])
    for _ in range(2):  # the second time it was done before
        assert predict("cut.avi", "--out", "out", "--no-drawings") == 1
        found = len(lines(tmp_path / "out" / "cut.jsonl"))
        assert 20 <= found <= 30
        assert f"cut.avi: {found} of 60 frames could be decoded; the file is cut or damaged" in capsys.readouterr().err
    assert predict("whole.avi", "--out", "all", "--no-drawings") == 0


def test_a_video_that_is_none_does_not_stop_the_others(predict: Predict, film: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "text.mp4").write_text("no video")
    assert predict("text.mp4", film, "--out", "out", "--no-drawings") == 1
    captured = capsys.readouterr()
    assert "text.mp4: OpenCV cannot decode a single frame" in captured.err
    assert "20 persons in 20 frames; 1 problem\n" in captured.out


def test_names_that_are_not_utf8_are_predicted_like_others(
    predict: Predict, film: Path, tmp_path: Path, picture
) -> None:
    folder = tmp_path / "odd"
    folder.mkdir()
    name = os.fsdecode(b"caf\xe9.png")
    cv2.imwrite(str(tmp_path / "plain.png"), picture)
    (tmp_path / "plain.png").rename(folder / name)
    video = tmp_path / os.fsdecode(b"f\xedlm.mp4")
    film.rename(video)
    assert predict(folder, video, "--out", "out") == 0
    assert [record["file_name"] for record in lines(tmp_path / "out" / "poses.jsonl")] == ["odd/caf\\xe9.png"]
    assert (tmp_path / "out" / "drawn" / "odd" / name).stat().st_size > 100
    assert (tmp_path / "out" / "drawn" / video.name).stat().st_size > 100


def test_pipes_and_devices_among_the_pictures_do_not_hang(
    predict: Predict, album: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.mkfifo(album / "pipe.jpg")
    (album / "endless.png").symlink_to("/dev/zero")
    (album / "gone.png").symlink_to(tmp_path / "nowhere")
    assert predict(album, "--out", "out") == 1
    error = capsys.readouterr().err
    assert all(f"{name}: not a regular file" in error for name in ("pipe.jpg", "endless.png", "gone.png"))
    assert predict(album / "pipe.jpg", "--out", "other") == 2
    assert "pipe.jpg: neither a file nor a folder" in capsys.readouterr().err


def test_sources_that_do_not_exist_or_hold_nothing_are_named(predict: Predict, tmp_path: Path, capsys) -> None:
    (tmp_path / "empty").mkdir()
    for source, message in (("nowhere.jpg", "no such picture, folder or video"), ("empty", "no pictures in it")):
        assert predict(source, "--out", "out") == 2
        assert f"{source}: {message}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ('{"annotations": []}', "expected a list of detections, got dict"),
        ('[{"bbox": [1, 2, 3, 4]}]', "detection 0: expected a mapping with file_name or image_id"),
        ('[{"image_id": 1, "bbox": [1, 2, 3]}]', r"detection 0: expected bbox \[x, y, w, h\], got \[1, 2, 3\]"),
        ('[{"image_id": null, "bbox": [1, 2, 3, 4]}]', "detection 0: expected a whole number as image_id"),
        ('[{"image_id": 1, "bbox": [1, 2, 3, 4], "score": null}]', "detection 0: expected .* a number as score"),
        ("[]", "of 0 detections none is a person's"),
    ],
    ids=["cut", "a COCO file", "no picture", "short box", "no number", "no score", "empty"],
)
def test_a_box_file_that_is_none_is_refused(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "boxes.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        BoxFile(tmp_path / "boxes.json")
    with pytest.raises(FileNotFoundError, match="no detections there"):
        BoxFile(tmp_path / "nowhere.json")


def test_boxes_that_match_no_source_are_an_error(
    predict: Predict, album: Path, film: Path, tmp_path: Path, capsys
) -> None:
    elsewhere = boxes(tmp_path / "boxes.json", {"file_name": "elsewhere.jpg", "bbox": [5, 5, 30, 50]})
    assert predict(album, "--boxes", elsewhere) == predict(film, "--boxes", elsewhere) == 2
    assert "boxes.json: names none of the 2 pictures; its boxes are of 'elsewhere.jpg'" in capsys.readouterr().err
    later = boxes(tmp_path / "later.json", {"image_id": 99, "bbox": [5, 5, 30, 50]})
    assert predict(film, "--boxes", later, "--no-drawings") == 1
    assert "film.mp4: the boxes name none of its 20 frames" in capsys.readouterr().err


def test_a_box_beside_the_picture_is_reported(predict: Predict, album: Path, tmp_path: Path, capsys) -> None:
    given = boxes(
        tmp_path / "boxes.json",
        {"file_name": "beach.png", "bbox": [7000, 7000, 30, 50]},
        {"image_id": 7, "bbox": [10, 10, 40, 80]},
    )
    assert predict(album, "--boxes", given, "--out", "out") == 1
    assert "beach.png: boxes: [7000.0, 7000.0, 7030.0, 7050.0] is beside the picture of 160 x 60" in (
        capsys.readouterr().err
    )
    assert [record["file_name"] for record in lines(tmp_path / "out" / "poses.jsonl")] == ["000000000007.jpg"]


def test_a_device_that_is_not_there_is_a_sentence(checkpoint: Path, album: Path, capsys) -> None:
    assert main(["predict", str(album), "--model", str(checkpoint), "--device", "banana"]) == 2
    assert "device 'banana' cannot be used here" in capsys.readouterr().err
