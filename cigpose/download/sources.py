"""What can be downloaded: one row per file, with its hosts, size, digests and terms.

Sizes and digests are of the files as their authors (or several independent projects) give them; None where nobody
does, then the first download is recorded in the raw folder's manifest.json and checked since.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

_COCO = ("http://images.cocodataset.org/", "https://s3.amazonaws.com/images.cocodataset.org/")
_HUGGING_FACE = "https://huggingface.co/datasets/msdkhairi/coco2017/resolve/main/"
_OPENMMLAB = "https://download.openmmlab.com/mmpose/"
_UBODY_FORM = "https://docs.google.com/forms/d/e/1FAIpQLSehgBP7wdn_XznGAM2AiJPiPLTqXXHw5uX9l7qeQ1Dh9HoO_A/viewform"

COCO_PICTURES = "pictures: Flickr terms of use, each picture its own licence; annotations: CC BY 4.0 (cocodataset.org)"
COCO_ANNOTATIONS = "CC BY 4.0, COCO Consortium (cocodataset.org)"
WHOLEBODY = "research and non-commercial use only, CC BY-NC 4.0 (github.com/jin-s13/COCO-WholeBody)"
DETECTIONS = "boxes of a person detector on COCO val2017; no licence stated"
UBODY = "no licence stated; handed out personally after a form (github.com/IDEA-Research/OSX)"
CROWDPOSE = "no licence stated; pictures come from several sets (github.com/Jeff-sjtu/CrowdPose)"
MMPOSE = "model zoo of MMPose, an Apache-2.0 project (github.com/open-mmlab/mmpose)"
CIGPOSE = "see github.com/53mins/CIGPose"


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceFile:
    """One file that can be downloaded."""

    name: str
    """Name in the table, in params.yaml and in the raw folder."""
    urls: tuple[str, ...]
    """Where it lies, best first. Empty: only with a Google Drive id of the user's own."""
    licence: str
    bytes: int | None = None
    """Exact size."""
    about_bytes: int | None = None
    """Rough size where the exact one is not published; for the announcement and the disk only."""
    sha256: str | None = None
    md5: str | None = None
    form: str | None = None
    """Form to fill for access, where the Drive id comes from the user's params."""

    @property
    def origin(self) -> str:
        """The public address for the record; the form's where the file's own is personal."""
        return self.form or self.urls[0]


def drive_url(drive_id: str) -> str:
    """The address at which Google Drive serves a shared file."""
    return f"https://drive.google.com/uc?export=download&id={drive_id}"


def _coco(name: str, path: str, size: int, sha256: str, md5: str, licence: str) -> SourceFile:
    urls = tuple(host + path for host in _COCO)
    return SourceFile(name=name, urls=urls, bytes=size, sha256=sha256, md5=md5, licence=licence)


def _on_drive(name: str, drive_id: str, licence: str, *more: str, **facts: int | str | None) -> SourceFile:
    return SourceFile(name=name, urls=(drive_url(drive_id), *more), licence=licence, **facts)  # type: ignore[arg-type]


def _ubody(name: str) -> SourceFile:
    return SourceFile(name=name, urls=(), form=_UBODY_FORM, licence=UBODY)


def _backbone(name: str, *folders: str) -> SourceFile:
    return SourceFile(name=name, urls=tuple(f"{_OPENMMLAB}v1/projects/{f}/{name}" for f in folders), licence=MMPOSE)


def _checkpoint(preset: str, drive_id: str) -> SourceFile:
    return _on_drive(f"{preset}.pth", drive_id, CIGPOSE)


def table_of(*rows: SourceFile) -> dict[str, SourceFile]:
    """Rows by name."""
    return {row.name: row for row in rows}


# fmt: off
COCO_ROWS = (
    _coco("train2017.zip", "zips/train2017.zip", 19_336_861_798,
          "69a8bb58ea5f8f99d24875f21416de2e9ded3178e903f1f7603e283b9e06d929",
          "cced6f7f71b7629ddf16f17bbcfab6b2", COCO_PICTURES),
    _coco("val2017.zip", "zips/val2017.zip", 815_585_330,
          "4f7e2ccb2866ec5041993c9cf2a952bbed69647b115d0f74da7ce8f4bef82f05",
          "442b8da7639aecaf257c1dceb8ba8c80", COCO_PICTURES),
    _coco("annotations_trainval2017.zip", "annotations/annotations_trainval2017.zip", 252_907_541,
          "113a836d90195ee1f884e704da6304dfaaecff1f023f49b6ca93c4aaae470268",
          "f4bbac642086de4f52a3fdda2de5fa2c", COCO_ANNOTATIONS),
    _on_drive("coco_wholebody_train_v1.0.json", "1thErEToRbmM9uLNi1JXXfOsaS5VK2FXf", WHOLEBODY,
              _HUGGING_FACE + "coco_wholebody_train_v1.0.json", about_bytes=3_160_000_000),
    _on_drive("coco_wholebody_val_v1.0.json", "1N6VgwKnj8DeyGXCvp1eYgNbRmw6jdfrb", WHOLEBODY,
              _HUGGING_FACE + "coco_wholebody_val_v1.0.json", about_bytes=133_000_000,
              sha256="f8272e9c12f3a42457033ebc75da1167546edf1be5e2ffaf586d6ee97541ff6e"),
    _on_drive("COCO_val2017_detections_AP_H_56_person.json", "1ygw57X-mh0QBfENB-U5DsuSauGIu-8RB", DETECTIONS,
              _HUGGING_FACE + "COCO_val2017_detections_AP_H_56_person.json", bytes=16_383_781,
              sha256="53ba0ad8d0fd461c5a000cd90797fa8c39cd8c38cd125125c0412626ff592d59",
              md5="d5289281a44400280199b9ebda263743"),
)
CROWDPOSE_ROWS = (
    _on_drive("images.zip", "1VprytECcLtU4tKP32SYi_7oDRbw7yUTL", CROWDPOSE),
    # Annotations of all splits and the person detections of the test split, as MMPose packs them.
    SourceFile(name="crowdpose_annotations.tar", urls=(_OPENMMLAB + "datasets/crowdpose_annotations.tar",),
               licence=CROWDPOSE),
    # The authors' own annotation files, an alternative to the tar (without detections).
    _on_drive("crowdpose_train.json", "1b3APtKpc43dx_5FxizbS-EWGvd-zl7Lb", CROWDPOSE),
    _on_drive("crowdpose_val.json", "18-IwNa6TOGQPE0RqGNjNY1cJOfNC7MXj", CROWDPOSE, about_bytes=2_746_206),
    _on_drive("crowdpose_trainval.json", "13xScmTWqO6Y6m_CjiQ-23ptgX9sC-J9I", CROWDPOSE),
    _on_drive("crowdpose_test.json", "1FUzRj-dPbL1OyBwcIX2BgFPEaY5Yrz7S", CROWDPOSE),
)
UBODY_ROWS = (_ubody("videos.zip"), _ubody("annotations.zip"), _ubody("splits.zip"))
# The eight hex digits in these names are not to be trusted: files there were uploaded again under old names.
PRETRAINED_ROWS = (
    _backbone("cspnext-m_udp-aic-coco_210e-256x192-f2f7d6f6_20230130.pth", "rtmposev1", "rtmpose"),
    _backbone("cspnext-l_udp-aic-coco_210e-256x192-273b7631_20230130.pth", "rtmposev1", "rtmpose"),
    _backbone("cspnext-x_udp-body7_210e-384x288-d28b58e6_20230529.pth", "rtmposev1"),
)
# The authors' trained models, under the names of our presets.
CHECKPOINT_ROWS = (
    _checkpoint("cigpose-m_coco-wholebody_256x192", "1GvTAyJGUIVI-5KWKRumqx1YH4dEjmwBv"),
    _checkpoint("cigpose-l_coco-wholebody_256x192", "1mC5GkU7v_M3tIi8NaDaKDrYvyde-ca2J"),
    _checkpoint("cigpose-l_coco-wholebody_384x288", "1q_j2bA3A5UubBDEeyHo2z1MPrcDSOMSt"),
    _checkpoint("cigpose-x_coco-wholebody_384x288", "1S08T9Mvpqjt9TGtQ1Tc-5X8HRDff157d"),
    _checkpoint("cigpose-l_coco-ubody_256x192", "1KtgCcbIPIC1EGyIKjXvVF6aag1ow_9xY"),
    _checkpoint("cigpose-l_coco-ubody_384x288", "1HAhF_tZNOxY4hNWTKooSnMGAguK1U8Pu"),
    _checkpoint("cigpose-x_coco-ubody_384x288", "13RmDZpWku876gsrrMso6DfnK7F4Z4vZ2"),
    _checkpoint("cigpose-m_coco_256x192", "1tNXidCKVhXqxT8WIYPEdSfIEownbIl5E"),
    _checkpoint("cigpose-l_coco_256x192", "1jsKXa4waJKkLFmF7IhWVA_xMBs5_61zr"),
    _checkpoint("cigpose-l_coco_384x288", "14GUos6gnw3Rm78SPPIb48DnK5gzhzFAb"),
    _checkpoint("cigpose-m_crowdpose_256x192", "1nH_ONU-4CbaUs6xh20Jqhj_gHf_HFtmi"),
    _checkpoint("cigpose-l_crowdpose_256x192", "1_q2GlrZxOvtK2aQLx79G-B7h3s3kPLgM"),
    _checkpoint("cigpose-l_crowdpose_384x288", "10DYfrnQstJZ3WjWY3I9d9R7cxlptlrNL"),
    _checkpoint("cigpose-x_crowdpose_384x288", "1VN_OhFUeKtwvm0Pdyj5mt5mLwlVCIXaO"),
)
# fmt: on

TABLE: Mapping[str, SourceFile] = table_of(*COCO_ROWS, *CROWDPOSE_ROWS, *UBODY_ROWS, *PRETRAINED_ROWS, *CHECKPOINT_ROWS)
"""Every file that can be downloaded, by name. `data.download.sources` in params.yaml names files of it."""
